"""A model's weights on disk, by their names in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from flora.convert.tensor_files import TensorFiles
from flora.models import meta_model, shared_parameters

IN_MEMORY = (
    "transformers computes some of this model's weights from several on disk: load the model and go on in memory "
    "(`PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)`)"
)


class MissingWeight(ValueError):
    """A checkpoint has no such weight."""


@dataclass(frozen=True)
class Checkpoint(TensorFiles):
    """The weights of one model: by key as they lie on disk, and by their names in the model, which transformers may
    have changed since, or may make of several on disk."""

    def find(self, module: str, parameter: str = "weight") -> str:
        """The key of a model's weight. Its name in the model may differ by what transformers calls it on disk, and by a
        prefix of either: a model may have been saved without its head, or with one.

        Raises:
            MissingWeight: naming the weight, with the nearest keys; also where transformers makes it of several on disk
                (``pieces``).
            ValueError: where several fit.
        """
        name = full_key(module, parameter)
        found = self.fitting(name)
        if not found:
            raise MissingWeight(f"{self.source} has no weight {name!r}; {self.nearest(name)}{self._hint}")
        if len(found) > 1:
            raise ValueError(f"{self.source} has several weights that {name!r} may be: {', '.join(found[:5])}")
        return found[0]

    def pieces(self, module: str, parameter: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor of a weight's shape, such as an update of it, as it lies on disk, by key. Mostly that is one tensor
        as it is; transformers keeps stacked experts as a matrix each, and some others turned around.

        Raises:
            ValueError: as ``find`` does.
        """
        name = full_key(module, parameter)
        if self._conversion[1] and not self.fitting(name):
            from transformers.core_model_loading import revert_weight_conversion

            pieces = revert_weight_conversion(self.model, {name: tensor})
            if set(pieces) != {name} or name in self.files:  # else it is not converted, and missing
                return {self._place(name, key, piece): piece for key, piece in pieces.items()}
        return {self.find(module, parameter): tensor}

    def _place(self, name: str, key: str, piece: Tensor) -> str:
        found = _fitting(key, {key: key for key in self.files})
        if len(found) != 1 or self.shape(found[0]) != piece.shape:
            where = f"; {key!r} has shape {list(self.shape(found[0]))}" if len(found) == 1 else ""
            raise ValueError(
                f"{self.source}: {name!r} lies on disk as {key!r}, of shape {list(piece.shape)}{where}{self._hint}"
            )
        return found[0]

    def fitting(self, name: str) -> list[str]:
        """The keys that a weight of the model may have: one where all is well."""
        return _fitting(name, self._names)

    @cached_property
    def model(self) -> nn.Module | None:
        """transformers' model on the meta device, as the config.json beside the weights describes it; None where that
        is missing or another library's."""
        path = next(iter(self.files.values())).with_name("config.json")
        return meta_model(path) if path.is_file() else None

    @cached_property
    def _conversion(self) -> tuple[list, list]:
        """transformers' rules from names on disk to names in the model: renamings, and converters of tensors."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter
        except ImportError:  # transformers 4 loads what is on disk
            return [], []
        rules = get_model_conversion_mapping(self.model) if self.model is not None else []
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        return [rule for rule in rules if rule not in converters], converters

    @cached_property
    def _names(self) -> dict[str, str]:
        """The key of every weight by its names: the model's, then the file's own. Without those that are converted."""
        renamings, converters = self._conversion
        if not renamings and not converters:
            return {key: key for key in self.files}
        from transformers.core_model_loading import rename_source_key

        renamed = {key: rename_source_key(key, renamings, converters) for key in self.files}
        names = {name: key for key, (name, converter) in renamed.items() if converter is None}
        return {key: key for key in names.values()} | names

    @cached_property
    def ties(self) -> list[list[str]]:
        """The keys of each group of weights that are one in the model: by the model's own account, else where a torch
        file says so. What the files lack, since it is there under another key, goes by its name in the model."""
        if self.model is not None:
            names = [
                [next(iter(self.fitting(name)), name) for name in group] for group in shared_parameters(self.model)
            ]
            return [group for group in names if any(key in self.files for key in group)]
        places: dict[tuple, list[str]] = {}
        for key, entry in self._entries.items():
            if isinstance(entry, Tensor):
                places.setdefault((entry.data_ptr(), entry.shape, entry.stride()), []).append(key)
        return [keys for keys in places.values() if len(keys) > 1]

    @property
    def _hint(self) -> str:
        return f"; {IN_MEMORY}" if self._conversion[1] else ""


def full_key(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _fitting(name: str, keys: Mapping[str, str]) -> list[str]:
    """What ``keys`` has under the name, or else under names that are longer or shorter by a prefix."""
    if name in keys:
        return [keys[name]]
    longer = [key for other, key in keys.items() if other.endswith(f".{name}")]
    parts = name.split(".")
    # at least a module and its parameter: "weight" alone would fit anything
    shorter = [keys[other] for n in range(1, len(parts) - 1) if (other := ".".join(parts[n:])) in keys]
    return list(dict.fromkeys(longer + shorter))
