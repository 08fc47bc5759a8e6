"""What every tensor of a merged model is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.convert.adapter import PREFIX, Adapter, Update
from flora.convert.checkpoint import Checkpoint, MissingWeight, full_key, split_key
from flora.files import WEIGHTS
from flora.layers import kinds
from flora.layers.execution.cost import LOW_PRECISION
from flora.layers.sites import Site

FLOATS = (torch.float64, torch.float32, *LOW_PRECISION)


@dataclass
class Entry:
    """One tensor of the merged model.

    Args:
        shape, dtype: the tensor's.
        origin: a key of the base, or a tensor of the adapter that replaces the base's.
        update: the update to add.
        whole: whether the tensor is the update's weight as the model has it. Otherwise transformers computes that
            weight from several tensors on disk, of which this is one (``Checkpoint.pieces``).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str | Tensor
    update: Update | None = None
    whole: bool = True

    @property
    def replaced(self) -> bool:
        return isinstance(self.origin, Tensor)

    @property
    def changed(self) -> bool:
        return self.update is not None or self.replaced


class MergedModel:
    """The tensors of a base model with an adapter merged in, by key. Making one checks everything that can be checked
    before the weights are read.

    ``untied`` has the groups of tied weights that are no longer equal.

    Raises:
        ValueError: naming layer, key, file and shapes, if the adapter does not fit the base.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.entries = {key: self._base_entry(key) for key in base.keys()}
        absent: dict[str, Entry] = {}  # names of tied weights that the files have under another key
        for group in base.ties:
            present = next(key for key in group if key in self.entries)
            absent |= {key: self._base_entry(present) for key in group if key not in self.entries}
        self.entries |= absent
        others = adapter.other_tensors()
        for key in sorted(others, key=_is_frozen, reverse=True):
            self._replace(key, others[key])
        for update in adapter.updates():
            self._add(update)
        self.untied = [group for group in base.ties if not self._is_tied(group)]
        if not self.untied:
            for key in absent:
                del self.entries[key]

    def origin(self, entry: Entry) -> Tensor:
        """The tensor before the update. It shares no memory, as safetensors requires."""
        if isinstance(entry.origin, str):
            return self.base.tensor(entry.origin)
        return entry.origin.clone(memory_format=torch.contiguous_format)

    def _base_entry(self, key: str) -> Entry:
        return Entry(self.base.shape(key), self.base.dtype(key), key)

    def _is_tied(self, group: Sequence[str]) -> bool:
        """Whether the weights of a tied group are still equal: all unchanged, or all replaced by the same tensor."""
        entries = [self.entries[key] for key in group]
        first = entries[0].origin
        return not any(entry.changed for entry in entries) or all(
            entry.update is None
            and isinstance(entry.origin, Tensor)
            and isinstance(first, Tensor)
            and torch.equal(entry.origin, first)
            for entry in entries
        )

    def _pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name in self.entries and name not in self.base:  # tied
            return {name: tensor}
        return self.base.pieces(*split_key(name), tensor)

    # ------------------------------------------------------------------------------------------- tensors of the adapter

    def _replace(self, key: str, tensor: Tensor) -> None:
        """Replace the base's tensor by one that the adapter holds whole."""
        if key.endswith("trainable_tokens_delta"):
            raise ValueError(
                f"{self.adapter.folder / WEIGHTS}: {key!r} are single rows of an embedding, which only PEFT merges: "
                "`PeftModel.from_pretrained(model, adapter).merge_and_unload()`"
            )
        name = key.removeprefix(PREFIX).replace(".base_layer", "")
        try:
            pieces = self._pieces(name, tensor)
        except MissingWeight:
            pieces = {name: tensor}
        for own_key, piece in pieces.items():
            group = next((group for group in self.base.ties if own_key in group), [own_key])
            for twin in group if _is_frozen(key) else [own_key]:
                self._put(twin, piece)

    def _put(self, key: str, tensor: Tensor) -> None:
        entry = self.entries.get(key)
        if entry is not None:
            if tensor.is_floating_point():
                self._check_dtype(key, entry)
            tensor = tensor.to(entry.dtype)
            if entry.shape == tensor.shape and torch.equal(tensor, self.origin(entry)):
                return
        self.entries[key] = Entry(tuple(tensor.shape), tensor.dtype, tensor)

    def _add(self, update: Update) -> None:
        """Add an update to the entries of its weight."""
        file, layer = self.adapter.folder / WEIGHTS, update.site.name
        self._check_modes(update)
        probe = torch.empty(update.shape, device="meta")
        for key, piece in self._pieces(full_key(update.site.module, update.site.parameter), probe).items():
            entry = self.entries[key]
            self._check_dtype(key, entry)
            if entry.shape != piece.shape:
                raise ValueError(
                    f"layer {layer!r}: the update in {file} has shape {list(update.shape)}; {key!r} in "
                    f"{self.base.files.get(key, file)} has shape {list(entry.shape)}"
                )
            if entry.update is not None:
                raise ValueError(
                    f"layers {entry.update.site.name!r} and {layer!r} are both {key!r} of {self.base.source}"
                )
            entry.update, entry.whole = update, piece is probe

    def _check_modes(self, update: Update) -> None:
        """Raise ValueError if the base's config tells another order of the weight's modes than the adapter."""
        site = update.site
        try:
            layer = self.base.model.get_submodule(site.module)
            kind, shape = kinds.describe(layer, site.parameter)
        except (AttributeError, ValueError):  # no config, or other names than the adapter's: the files' names decide
            return
        actual = Site.of(layer, kind, site.module, site.parameter).modes(shape)
        if shape == update.shape and actual != site.modes(shape):
            raise ValueError(
                f"layer {site.name!r}, shape {list(shape)}: the update in {self.adapter.folder / WEIGHTS} is for "
                f"{site.modes(shape)}, {self.base.source} has {actual}; was it imported without base=?"
            )

    def _check_dtype(self, key: str, entry: Entry) -> None:
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{key!r} of {self.base.source} has dtype {entry.dtype}: a quantized model cannot be merged; give the "
                "model before quantization"
            )


def _is_frozen(key: str) -> bool:
    """Whether it is the weight or bias of an adapted layer, which PEFT saves for embeddings and with ``bias``. For a
    tied weight it stands for all names."""
    return ".base_layer." in key
