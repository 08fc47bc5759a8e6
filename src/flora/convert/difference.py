"""Two checkpoints of one model, weight by weight: what changed, and where an adapter can hold it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flora.convert.checkpoint import Checkpoint
from flora.convert.slots import Side, Slot, parts, slots_of
from flora.convert.truncate import Front, front
from flora.layers import kinds
from flora.layers.kinds import RAW, Kind
from flora.layers.weights import full_name
from flora.tuner.config import FloraConfig
from flora.tuner.planning import PlannedWeight, make_plan
from flora.tuner.targets import canonical_module


@dataclass(frozen=True)
class Place:
    """How a core space gets at a weight: ``target`` names its layer, or, if ``raw``, the parameter itself; ``name`` is
    what FLoRA calls it."""

    name: str
    target: str
    raw: bool
    kind: Kind
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A slot that is not the same in both. ``energy``: ‖D‖² of a parameter's difference D. ``place``, ``front``: of a
    weight that gets a core space. ``new``: the base has nothing of this shape."""

    slot: Slot
    energy: float = 0.0
    place: Place | None = None
    front: Front | None = None
    new: bool = False


class Pair:
    """The checkpoints ``base`` and ``tuned`` of the structure ``model``; to begin with, headers alone are read.

    Raises:
        ValueError: naming checkpoint, key and shapes, where they are not of this model.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, model: nn.Module) -> None:
        self.model = model
        slots, taken = list(slots_of(model)), set()
        self.base, self.tuned = Side(base, slots), Side(tuned, slots)
        for slot in slots:
            before, after = self.base.keys[slot], self.tuned.keys[slot]
            taken.update(after)
            if before and not after and slot.is_parameter:
                raise ValueError(f"{tuned.source} has no weight {slot.name!r}, which is {before[0]!r} in {base.source}")
            for checkpoint, keys in ((base, before), (tuned, after)) if slot.is_parameter else ():
                if strange := [key for key in keys if not checkpoint.dtype(key).is_floating_point]:
                    raise ValueError(
                        f"{checkpoint.source}: {strange[0]!r} has dtype {checkpoint.dtype(strange[0])}; a "
                        "floating-point one is needed"
                    )
            if (shape := self.tuned.shape(slot)) not in (None, slot.shape):
                raise ValueError(
                    f"{tuned.source}: {after[0]!r} has shape {list(shape)}, but {list(slot.shape)} in the model that "
                    "the adapter would be loaded onto; give one with the tuned model's heads"
                )
        for key in tuned.keys():
            if key not in taken and tuned.dtype(key).is_floating_point and not self._is_in_base(key):
                raise ValueError(f"{tuned.source}: {key!r} is no weight of the model, a {type(model).__name__}")
        self.slots = {name: slot for slot in slots if self.tuned.keys[slot] for name in slot.names}

    def _is_in_base(self, key: str) -> bool:
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        return key in base and base.shape(key) == tuned.shape(key) and torch.equal(base.tensor(key), tuned.tensor(key))

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))

    # ------------------------------------------------------------------------------------------------- what changed

    def changes(self) -> Iterator[Change | None]:
        """One for every slot, None for what is the same in both."""
        for name, slot in self.slots.items():
            if name == slot.name:
                yield self._change(slot)

    def _change(self, slot: Slot) -> Change | None:
        if self.base.shape(slot) != slot.shape:
            return Change(slot, new=True)
        difference = self.difference(slot)
        if not difference.any():
            return None
        if not slot.is_parameter:
            return Change(slot)
        energy = difference.square().sum().item()
        if energy != energy or energy == float("inf"):
            raise ValueError(f"{slot.name!r}: the difference of base and tuned model is not finite")
        place = self._place(slot)
        return Change(slot, energy, place, place and front(difference))

    def difference(self, slot: Slot) -> Tensor:
        """tuned - base in float64, of the slot's shape."""
        return self.tuned.read(slot).double() - self.base.read(slot).double()

    def dtype(self, slot: Slot) -> torch.dtype:
        """Of the core and the factors: float32, unless a checkpoint has more."""
        wide = torch.float64 in (self.base.dtype(slot), self.tuned.dtype(slot))
        return torch.float64 if wide else torch.float32

    def _place(self, slot: Slot) -> Place | None:
        module, leaf = parts(slot.name)
        # a shared weight is adapted in one of its layers only, or not at all
        if slot.is_vector or not module or len(slot.names) > 1:
            return None
        layer = canonical_module(self.model, module)
        weight = leaf if layer == module else f"{module.removeprefix(f'{layer}.')}.{leaf}"
        try:
            kind, _, roles = kinds.describe(self.modules[layer], weight)
        except ValueError:
            return None
        raw = kind is RAW or len(kind.weights) > 1  # such a layer's name would target all of its weights
        return Place(
            name=full_name(layer, weight),
            target=slot.name if raw else layer,
            raw=raw,
            kind=kind,
            roles=roles,
        )

    # ------------------------------------------------------------------------------------------------ what holds it

    def rest(self, adapted: Iterable[Slot], changes: Sequence[Change]) -> tuple[list[str], list[Slot], list[Change]]:
        """What holds the changes beside the adapted weights: layers to be saved whole, where all of their parameters
        changed or a vector would not do; vectors to be adapted at rank 1; and the changes that nothing in PEFT holds:
        of a module that has adapted layers in it, or of the model itself.

        Raises ValueError where that is a new weight, without which the model can't run.
        """
        changed = defaultdict(list)
        for change in changes:
            for module in change.slot.modules:
                changed[module].append(change)
        whole = [m for m, own in changed.items() if self._is_full(m, own) or not all(map(self._can_be_raw, own))]
        while True:
            busy = {module for slot in adapted for module in slot.modules} | (changed.keys() - set(whole))
            clash = next((module for module in whole if not self._can_save(module, busy)), None)
            if clash is None:
                break
            if new := [change.slot.name for change in changed[clash] if change.new]:
                raise ValueError(f"{new[0]!r} is new, but its layer can't be saved beside adapted ones of such names")
            whole.remove(clash)
        saved = [name for name in self.modules if any(name.endswith(module) for module in whole)]
        others = [change for change in changes if not set(change.slot.modules) <= set(whole)]
        vectors = [change.slot for change in others if self._can_be_raw(change)]
        return saved, vectors, [change for change in others if not self._can_be_raw(change)]

    def _is_full(self, module: str, own: Sequence[Change]) -> bool:
        return len(own) == sum(p is not None for p in self.modules[module]._parameters.values())

    def _can_be_raw(self, change: Change) -> bool:
        """Whether a raw parameter of rank 1 can hold it."""
        (module, *shared), slot = change.slot.modules, change.slot
        return slot.is_parameter and slot.is_vector and not change.new and not shared and module != ""

    def _can_save(self, module: str, busy: set[str]) -> bool:
        """Whether it, and all that PEFT takes for it because its name ends the same or lies within such a name, are
        single layers and free of adapters."""
        meant = [name for name in self.modules if name.endswith(module)] if module else [""]
        inner = [name for name in self.modules if f".{module}." in f".{name}."]
        around = [module[:n] for n, letter in enumerate(module) if letter == "."]
        return not (any(map(self._has_layers, meant)) or busy.intersection(meant + inner + around))

    def _has_layers(self, module: str) -> bool:
        """Whether there are layers with parameters in it."""
        inner = self.modules[module].children()
        return kinds.kind_of(self.modules[module]) is None and any(any(True for _ in c.parameters()) for c in inner)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """All that a layer's state dict has, as in the tuned checkpoint."""
        names = [f"{module}.{key}" for key in self.modules[module].state_dict()]
        if missing := [name for name in names if name not in self.slots]:
            raise ValueError(f"{self.tuned.checkpoint.source} has no weight {missing[0]!r}")
        return {name: self.tuned.read(self.slots[name]) for name in names}

    def plan(
        self, places: Sequence[Place], vectors: Sequence[Slot], saved: Sequence[str]
    ) -> tuple[FloraConfig, list[PlannedWeight]]:
        """The config that adapts these weights, and what it makes of the model: now and then more raw parameters, whose
        names end in the same way as others'."""
        modules = [place.target for place in places if not place.raw]
        raw = [place.target for place in places if place.raw] + [slot.name for slot in vectors]
        config = FloraConfig(
            r=1, target_modules=modules or None, target_parameters=raw or None, modules_to_save=list(saved) or None
        )
        rows = make_plan(self.model, config).rows
        if {row.target for row in rows if not row.raw} != set(modules):  # a name ends in the same way as another
            config.target_modules = "|".join(map(re.escape, modules))
            rows = make_plan(self.model, config).rows
        return config, rows
