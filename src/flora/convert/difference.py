"""Two checkpoints of one model, weight by weight: what changed, and where an adapter can hold it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flora.convert.checkpoint import Checkpoint, split_key
from flora.convert.fronts import Front, front_of
from flora.convert.slots import Slot, SlotReader, slots_of
from flora.layers import kinds
from flora.layers.kinds import RAW
from flora.layers.sites import Site
from flora.tuner.config import FloraConfig
from flora.tuner.planning.plan import PlannedWeight, make_plan
from flora.tuner.planning.targets import canonical_module


@dataclass(frozen=True)
class Change:
    """A slot that differs between the checkpoints.

    Args:
        slot: the parameter or buffer.
        energy: ‖D‖² of a parameter's difference D.
        site, front: of a weight that can have a core space, else None.
        new: whether the base has no tensor of this shape.
    """

    slot: Slot
    energy: float = 0.0
    site: Site | None = None
    front: Front | None = None
    new: bool = False


@dataclass(frozen=True)
class Holders:
    """Where the changes go that no core space holds.

    Args:
        layers: modules to save whole.
        vectors: slots that a raw parameter of rank 1 holds exactly.
        left_out: changes that PEFT cannot hold.
    """

    layers: list[str]
    vectors: list[Slot]
    left_out: list[Change]


class CheckpointPair:
    """The checkpoints ``base`` and ``tuned`` of one ``model``. Only headers are read at first.

    Raises:
        ValueError: naming checkpoint, key and shapes, if one is not of this model.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, model: nn.Module) -> None:
        self.model = model
        slots = list(slots_of(model))
        self.base, self.tuned = SlotReader(base, slots), SlotReader(tuned, slots)
        for slot in slots:
            self._check(slot)
        known = {key for slot in slots for key in self.tuned.keys[slot]}
        for key in tuned.keys():
            if key not in known and tuned.dtype(key).is_floating_point and not self._is_in_base(key):
                raise ValueError(f"{tuned.source}: {key!r} is not a weight of the model, a {type(model).__name__}")
        self.slots = {name: slot for slot in slots if self.tuned.keys[slot] for name in slot.names}

    def _check(self, slot: Slot) -> None:
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        before, after = self.base.keys[slot], self.tuned.keys[slot]
        if before and not after and slot.is_parameter:
            raise ValueError(f"{tuned.source} has no weight {slot.name!r}, which is {before[0]!r} in {base.source}")
        for checkpoint, keys in ((base, before), (tuned, after)) if slot.is_parameter else ():
            if strange := [key for key in keys if not checkpoint.dtype(key).is_floating_point]:
                raise ValueError(
                    f"{checkpoint.source}: {strange[0]!r} has dtype {checkpoint.dtype(strange[0])}; a floating-point "
                    "one is needed"
                )
        if (shape := self.tuned.shape(slot)) not in (None, slot.shape):
            raise ValueError(
                f"{tuned.source}: {after[0]!r} has shape {list(shape or ())}, but {list(slot.shape)} in the model that "
                "the adapter would be loaded onto; give a model with the tuned model's heads"
            )

    def _is_in_base(self, key: str) -> bool:
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        return key in base and base.shape(key) == tuned.shape(key) and torch.equal(base.tensor(key), tuned.tensor(key))

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))

    # ----------------------------------------------------------------------------------------------------- what changed

    def changes(self) -> Iterator[Change | None]:
        """One per slot, None if it is the same in both checkpoints."""
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
        site = self._site(slot)
        return Change(slot, energy, site, front_of(difference) if site else None)

    def difference(self, slot: Slot) -> Tensor:
        """tuned - base in float64, of the slot's shape."""
        return self.tuned.read(slot).double() - self.base.read(slot).double()

    def dtype(self, slot: Slot) -> torch.dtype:
        """The dtype for core and factors: float64 if a checkpoint has it, else float32."""
        wide = torch.float64 in (self.base.dtype(slot), self.tuned.dtype(slot))
        return torch.float64 if wide else torch.float32

    def _site(self, slot: Slot) -> Site | None:
        """The site of a weight that can have a core space, else None."""
        module, leaf = split_key(slot.name)
        # PEFT adapts a shared weight in one of its layers, or not at all
        if slot.is_vector or not module or len(slot.names) > 1:
            return None
        name = canonical_module(self.model, module)
        weight = leaf if name == module else f"{module.removeprefix(f'{name}.')}.{leaf}"
        layer = self.modules[name]
        try:
            kind, _ = kinds.describe(layer, weight)
        except ValueError:
            return None
        return Site.of(layer, kind, name, weight)

    # ---------------------------------------------------------------------------------------------- what holds the rest

    def holders(self, adapted: Iterable[Slot], changes: Sequence[Change]) -> Holders:
        """Where the changes go that no core space holds.

        A layer is saved whole if all of its parameters changed, or one that is not a vector. Other vectors are adapted
        at rank 1. Left out is what PEFT cannot hold: parameters of the model itself, or of a module that contains
        adapted layers.

        Args:
            adapted: the slots that get core spaces.
            changes: all other changes.

        Raises:
            ValueError: if a new weight would be left out, since the model cannot run without it.
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
                raise ValueError(
                    f"{new[0]!r} is new, but PEFT cannot save its layer whole beside adapted layers of similar names"
                )
            whole.remove(clash)
        layers = [name for name in self.modules if any(name.endswith(module) for module in whole)]
        others = [change for change in changes if not set(change.slot.modules) <= set(whole)]
        vectors = [change.slot for change in others if self._can_be_raw(change)]
        return Holders(layers, vectors, [change for change in others if not self._can_be_raw(change)])

    def _is_full(self, module: str, own: Sequence[Change]) -> bool:
        return len(own) == sum(p is not None for p in self.modules[module]._parameters.values())

    def _can_be_raw(self, change: Change) -> bool:
        """Whether a raw parameter of rank 1 can hold it."""
        (module, *shared), slot = change.slot.modules, change.slot
        return slot.is_parameter and slot.is_vector and not change.new and not shared and module != ""

    def _can_save(self, module: str, busy: set[str]) -> bool:
        """Whether PEFT can save the module whole. PEFT takes all modules whose names end in this name, or contain it:
        they must be single layers without adapters."""
        meant = [name for name in self.modules if name.endswith(module)] if module else [""]
        inner = [name for name in self.modules if f".{module}." in f".{name}."]
        around = [module[:n] for n, letter in enumerate(module) if letter == "."]
        return not (any(map(self._has_layers, meant)) or busy.intersection(meant + inner + around))

    def _has_layers(self, module: str) -> bool:
        """Whether it contains layers with parameters."""
        inner = self.modules[module].children()
        return kinds.kind_of(self.modules[module]) is None and any(any(True for _ in c.parameters()) for c in inner)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """All tensors of a layer's state dict, by name, from the tuned checkpoint. Raises ValueError if one is
        missing."""
        names = [f"{module}.{key}" for key in self.modules[module].state_dict()]
        if missing := [name for name in names if name not in self.slots]:
            raise ValueError(f"{self.tuned.checkpoint.source} has no weight {missing[0]!r}")
        return {name: self.tuned.read(self.slots[name]) for name in names}

    def adapter_config(
        self, changes: Sequence[Change], vectors: Sequence[Slot], layers: Sequence[str]
    ) -> tuple[FloraConfig, list[PlannedWeight]]:
        """The config that adapts the weights of ``changes``, and ``vectors``, and saves ``layers`` whole; and all
        weights that it adapts. These may be more: PEFT also finds raw parameters whose names end in the same way."""
        raw = [c.slot.name for c in changes if c.site and _needs_raw_target(c.site)] + [slot.name for slot in vectors]
        modules = [c.site.module for c in changes if c.site and not _needs_raw_target(c.site)]
        config = FloraConfig(
            r=1, target_modules=modules or None, target_parameters=raw or None, modules_to_save=list(layers) or None
        )
        weights = make_plan(self.model, config).rows
        if {weight.target for weight in weights if not weight.raw} != set(modules):  # a name is the end of another name
            config.target_modules = "|".join(map(re.escape, modules))
            weights = make_plan(self.model, config).rows
        return config, weights


def _needs_raw_target(site: Site) -> bool:
    """Whether the weight is targeted by its own name. The layer's name would target all weights of its kind."""
    return site.kind is RAW or len(site.kind.weights) > 1
