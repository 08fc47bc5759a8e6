"""A model's weights on disk, by their names in the model, which transformers may have renamed or converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from flora.convert.tensor_files import TensorFiles
from flora.models import meta_model, shared_parameters

IN_MEMORY = (
    "transformers computes some weights of this model from several on disk: load the model and go on in memory "
    "(`PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)`)"
)


class MissingWeight(ValueError):
    """The checkpoint does not have the weight."""


@dataclass(frozen=True)
class Checkpoint(TensorFiles):
    """The weights of one model, by their keys on disk and by their names in the model."""

    def find(self, module: str, parameter: str = "weight") -> str:
        """The key of a weight of the model.

        Key and name may differ: transformers renames weights, and either may have a prefix that the other lacks, if the
        model was saved with a head or without one.

        Raises:
            MissingWeight: naming the weight and the nearest keys. Also if transformers computes it from several tensors
                on disk (see ``pieces``).
            ValueError: if several keys match.
        """
        name = full_key(module, parameter)
        keys = self.matches(name)
        if not keys:
            raise MissingWeight(f"{self.source} has no weight {name!r}; {self.nearest(name)}{self._hint}")
        if len(keys) > 1:
            raise ValueError(f"{self.source}: {name!r} may be any of {', '.join(keys[:5])}")
        return keys[0]

    def pieces(self, module: str, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of a weight's shape, such as its update, in the layout of the files: one tensor per key.

        Mostly it is a single tensor, unchanged. But transformers stores one matrix per expert for stacked experts, and
        transposes some other weights.

        Raises:
            MissingWeight, ValueError: as ``find``.
        """
        name = full_key(module, parameter)
        if self._conversion[1] and not self.matches(name):
            from transformers.core_model_loading import revert_weight_conversion

            pieces = revert_weight_conversion(self.model, {name: tensor})
            if set(pieces) != {name} or name in self.files:  # otherwise it is not converted, and missing
                return {self._place(name, key, piece): piece for key, piece in pieces.items()}
        return {self.find(module, parameter): tensor}

    def _place(self, name: str, key: str, piece: Tensor) -> str:
        keys = _matches(key, {key: key for key in self.files})
        if len(keys) != 1 or self.shape(keys[0]) != piece.shape:
            actual = f"; {key!r} has shape {list(self.shape(keys[0]))}" if len(keys) == 1 else ""
            raise ValueError(
                f"{self.source}: {name!r} should be on disk as {key!r}, of shape {list(piece.shape)}{actual}"
                f"{self._hint}"
            )
        return keys[0]

    def matches(self, name: str) -> list[str]:
        """The keys that may be a weight of the model: exactly one, unless it is missing or ambiguous."""
        return _matches(name, self._names)

    @cached_property
    def model(self) -> Any:
        """The ``nn.Module`` on the meta device, from the config.json beside the weights. None if that is missing, or
        not transformers'."""
        path = next(iter(self.files.values())).with_name("config.json")
        return meta_model(path) if path.is_file() else None

    @cached_property
    def _conversion(self) -> tuple[list, list]:
        """transformers' rules for names on disk to names in the model: renamings, and converters of tensors."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter
        except ImportError:  # transformers 4 converts nothing
            return [], []
        rules = get_model_conversion_mapping(self.model) if self.model is not None else []
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        return [rule for rule in rules if rule not in converters], converters

    @cached_property
    def _names(self) -> dict[str, str]:
        """The key of every weight that is not converted, by its name in the model and by the key itself."""
        renamings, converters = self._conversion
        if not renamings and not converters:
            return {key: key for key in self.files}
        from transformers.core_model_loading import rename_source_key

        renamed = {key: rename_source_key(key, renamings, converters) for key in self.files}
        names = {name: key for key, (name, converter) in renamed.items() if converter is None}
        return {key: key for key in names.values()} | names

    @cached_property
    def ties(self) -> list[list[str]]:
        """The groups of tied weights, by key.

        The model tells them; without a model, a torch file does, in which they share memory. A weight that the files
        have only under the key of another goes by its name in the model.
        """
        if self.model is not None:
            names = [
                [next(iter(self.matches(name)), name) for name in group] for group in shared_parameters(self.model)
            ]
            return [group for group in names if any(key in self.files for key in group)]
        storages: dict[tuple, list[str]] = {}
        for key, entry in self._entries.items():
            if isinstance(entry, Tensor):
                storages.setdefault((entry.data_ptr(), entry.shape, entry.stride()), []).append(key)
        return [keys for keys in storages.values() if len(keys) > 1]

    @property
    def _hint(self) -> str:
        return f"; {IN_MEMORY}" if self._conversion[1] else ""


def full_key(module: str, parameter: str) -> str:
    """A parameter's name in the model: "module.parameter"."""
    return f"{module}.{parameter}" if module else parameter


def split_key(name: str) -> tuple[str, str]:
    """The inverse of ``full_key``."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _matches(name: str, keys: Mapping[str, str]) -> list[str]:
    """The value of ``keys`` at this name, else its values at names that are longer or shorter by a prefix."""
    if name in keys:
        return [keys[name]]
    longer = [key for other, key in keys.items() if other.endswith(f".{name}")]
    parts = name.split(".")
    # at least a module and its parameter: "weight" alone would fit anything
    shorter = [keys[other] for n in range(1, len(parts) - 1) if (other := ".".join(parts[n:])) in keys]
    return list(dict.fromkeys(longer + shorter))
