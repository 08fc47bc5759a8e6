"""A model's parameters and buffers, and where they lie in a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod

import torch
from torch import Tensor, nn

from flora.convert.checkpoint import Checkpoint, MissingWeight, full_key, split_key


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a model.

    Args:
        names: its names; several if modules share it.
        shape: its shape.
        is_parameter: False for a buffer.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_parameter: bool

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def modules(self) -> list[str]:
        """The modules that hold it."""
        return [name.rpartition(".")[0] for name in self.names]

    @property
    def is_vector(self) -> bool:
        """Whether rank 1 holds it exactly: at most one mode is longer than 1."""
        return sum(size > 1 for size in self.shape) < 2

    def overlap(self, key: str) -> int:
        """The number of characters that the key's end has in common with the end of a name."""
        pairs = (zip(reversed(name), reversed(key), strict=False) for name in self.names)
        return max(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], letters)) for letters in pairs)


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """One slot per tensor of the model's state dict."""
    names, tensors = defaultdict(list), {}
    for module, layer in model.named_modules(remove_duplicate=False):
        buffers = {k: v for k, v in layer._buffers.items() if k not in layer._non_persistent_buffers_set}
        for leaf, tensor in (layer._parameters | buffers).items():
            if tensor is not None:
                names[id(tensor)].append(full_key(module, leaf))
                tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield Slot(tuple(names[key]), tuple(tensor.shape), isinstance(tensor, nn.Parameter))


class SlotReader:
    """Reads a model's slots from a checkpoint.

    ``keys`` has the keys of every slot: mostly one; several if transformers splits stacked experts on disk, or if tied
    weights lie there more than once; none if the slot is missing.

    Raises:
        ValueError: if several keys match a slot.
    """

    def __init__(self, checkpoint: Checkpoint, slots: Sequence[Slot]) -> None:
        self.checkpoint = checkpoint
        matches = {
            slot: list(dict.fromkeys(k for name in slot.names for k in checkpoint.matches(name))) for slot in slots
        }
        # the name of a missing weight may be the end of another name, and match that one's key
        owners: dict[str, Slot] = {}
        for slot, keys in matches.items():
            for key in keys:
                owners[key] = max(owners.get(key, slot), slot, key=lambda slot: slot.overlap(key))
        self.keys = {slot: [key for key in keys if owners[key] is slot] for slot, keys in matches.items()}
        for slot, keys in self.keys.items():
            if len(keys) > len(slot.names):
                raise ValueError(f"{checkpoint.source}: {slot.name!r} may be any of {', '.join(keys[:5])}")
        self.converted = {slot for slot, keys in matches.items() if not keys and self._find_pieces(slot)}

    def _find_pieces(self, slot: Slot) -> bool:
        """Whether transformers computes the slot from other tensors, which then become its keys."""
        probe = torch.empty(slot.shape, device="meta")
        try:
            self.keys[slot] = list(self.checkpoint.pieces(*split_key(slot.name), probe))
        except MissingWeight:
            return False
        return True

    def shape(self, slot: Slot) -> tuple[int, ...] | None:
        """The shape of the slot's tensor in the checkpoint, None if it is missing."""
        if slot in self.converted:
            return slot.shape
        return self.checkpoint.shape(self.keys[slot][0]) if self.keys[slot] else None

    def dtype(self, slot: Slot) -> torch.dtype:
        """The dtype of the slot's tensor in the checkpoint."""
        return self.checkpoint.dtype(self.keys[slot][0])

    def read(self, slot: Slot) -> Tensor:
        """The slot's tensor, of the slot's shape if the checkpoint's is the same model."""
        if slot not in self.converted:
            return self.checkpoint.tensor(self.keys[slot][0])
        # transformers only moves entries: converting the positions tells where each entry of the slot lies
        entries = torch.arange(prod(slot.shape)).view(slot.shape)
        tensor = torch.empty(entries.numel(), dtype=self.dtype(slot))
        for key, piece in self.checkpoint.pieces(*split_key(slot.name), entries).items():
            tensor[piece.flatten()] = self.checkpoint.tensor(key).flatten()
        return tensor.view(slot.shape)
