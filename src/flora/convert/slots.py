"""A model's parameters and buffers, and where a checkpoint has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod

import torch
from torch import Tensor, nn

from flora.convert.checkpoint import Checkpoint, MissingWeight


@dataclass(frozen=True)
class Slot:
    """A parameter or a buffer of the model, by all its names where modules share it."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_parameter: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def modules(self) -> list[str]:
        return [name.rpartition(".")[0] for name in self.names]

    @property
    def is_vector(self) -> bool:
        """Whether rank 1 holds it exactly."""
        return sum(size > 1 for size in self.shape) < 2

    def overlap(self, key: str) -> int:
        """How much of the key's end is a name's, too."""
        pairs = (zip(reversed(name), reversed(key), strict=False) for name in self.names)
        return max(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], letters)) for letters in pairs)


def parts(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module, parameter


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """All that a state dict of the model has."""
    names, tensors = defaultdict(list), {}
    for module, layer in model.named_modules(remove_duplicate=False):
        lasting = {k: v for k, v in layer._buffers.items() if k not in layer._non_persistent_buffers_set}
        for leaf, tensor in (layer._parameters | lasting).items():
            if tensor is not None:
                names[id(tensor)].append(f"{module}.{leaf}" if module else leaf)
                tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield Slot(tuple(names[key]), tuple(tensor.shape), isinstance(tensor, nn.Parameter))


class Side:
    """A checkpoint, asked for the model's slots.

    ``keys``: where each slot lies; one key mostly, several where transformers takes stacked experts apart, none where
    it is missing.

    Raises:
        ValueError: where several keys fit a slot.
    """

    def __init__(self, checkpoint: Checkpoint, slots: Sequence[Slot]) -> None:
        self.checkpoint = checkpoint
        fitting = {
            slot: list(dict.fromkeys(k for name in slot.names for k in checkpoint.fitting(name))) for slot in slots
        }
        # a name that is missing may be the end of another's, and seem to have its key
        owners: dict[str, Slot] = {}
        for slot, keys in fitting.items():
            for key in keys:
                owners[key] = max(owners.get(key, slot), slot, key=lambda slot: slot.overlap(key))
        self.keys = {slot: [key for key in keys if owners[key] is slot] for slot, keys in fitting.items()}
        for slot, keys in self.keys.items():
            if len(keys) > len(slot.names):
                raise ValueError(
                    f"{checkpoint.source} has several weights that {slot.name!r} may be: {', '.join(keys[:5])}"
                )
        self.taken_apart = {slot for slot, keys in fitting.items() if not keys and self._take_apart(slot)}

    def _take_apart(self, slot: Slot) -> bool:
        try:
            self.keys[slot] = list(self.checkpoint.pieces(*parts(slot.name), torch.empty(slot.shape, device="meta")))
        except MissingWeight:
            return False
        return True

    def shape(self, slot: Slot) -> tuple[int, ...] | None:
        if slot in self.taken_apart:
            return slot.shape
        return self.checkpoint.shape(self.keys[slot][0]) if self.keys[slot] else None

    def dtype(self, slot: Slot) -> torch.dtype:
        return self.checkpoint.dtype(self.keys[slot][0])

    def read(self, slot: Slot) -> Tensor:
        if slot not in self.taken_apart:
            return self.checkpoint.tensor(self.keys[slot][0])
        # transformers only moves entries about: where each of them goes says where it comes from
        entries = torch.arange(prod(slot.shape)).view(slot.shape)
        tensor = torch.empty(entries.numel(), dtype=self.dtype(slot))
        for key, piece in self.checkpoint.pieces(*parts(slot.name), entries).items():
            tensor[piece.flatten()] = self.checkpoint.tensor(key).flatten()
        return tensor.view(slot.shape)
