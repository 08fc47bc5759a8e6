"""Writes a merged model's weights file by file, and measures what rounding loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor

from flora import tucker
from flora.convert.adapter import progress_bar
from flora.convert.merged_model import MergedModel
from flora.files import save_tensors
from flora.layers.execution.cost import LOW_PRECISION


def shards(model: MergedModel, max_shard_size: int | str) -> tuple[StateDictSplit, str]:
    """Which keys each file gets, and the stem of the files' names. Raises ValueError for a size that is none."""
    sizes = {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in model.entries.items()}
    first = next(iter(model.base.files.values())).name
    stem = "diffusion_pytorch_model" if first.startswith("diffusion_pytorch_model") else "model"
    pattern = stem + "{suffix}.safetensors"
    try:
        if not isinstance(max_shard_size, str) and max_shard_size < 1:
            raise ValueError("at least one byte is needed")
        split = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"max_shard_size={max_shard_size!r}: {error}") from None
    return split, stem


class MergeWriter:
    """Writes the tensors of a merged model, each formed when it is needed."""

    def __init__(self, model: MergedModel) -> None:
        self.model = model
        self._squares: dict[str, tuple[float, float]] = {}  # per weight ‖lost‖² and ‖delta‖²
        self._pieces: dict[str, Tensor] = {}  # of updates that are several tensors on disk, until they are written

    def write(self, path: Path, keys: Sequence[str], label: str, progress: bool) -> None:
        """Write one file of weights. Raises ValueError if a merged weight is not finite."""
        tensors = {key: self._tensor(key) for key in progress_bar(keys, len(keys), label, progress)}
        save_tensors(path, tensors, self.model.base.metadata)

    def lost(self) -> dict[str, float]:
        """Per weight, the share of the update that rounding lost: ‖(stored - W) - delta‖ / ‖delta‖. Only of weights in
        low precision."""
        return {name: _ratio([pair]) for name, pair in self._squares.items()}

    def lost_in_all(self) -> float | None:
        """The same for all these weights together, None if there are none."""
        return _ratio(self._squares.values()) if self._squares else None

    def _tensor(self, key: str) -> Tensor:
        entry = self.model.entries[key]
        weight, update = self.model.origin(entry), entry.update
        if update is None:
            return weight
        wide = torch.promote_types(entry.dtype, torch.float32)
        low = entry.dtype in LOW_PRECISION
        if entry.whole:
            merged = update.merged_into(weight)
            delta = tucker.reconstruct(*update.scaled_space(wide)) if low else None
        else:
            if key not in self._pieces:
                full = tucker.reconstruct(*update.scaled_space(wide))
                self._pieces |= self.model.base.pieces(update.site.module, update.site.parameter, full)
            delta = self._pieces.pop(key)
            merged = (weight.to(wide) + delta).to(entry.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"layer {update.site.name!r}: {key!r} with the update is not finite in {entry.dtype}, shape "
                f"{list(entry.shape)}"
            )
        if low and delta is not None:
            self._measure(update.site.name, merged.float() - weight.float() - delta, delta)
        return merged.contiguous()

    def _measure(self, name: str, lost: Tensor, delta: Tensor) -> None:
        before = self._squares.get(name, (0.0, 0.0))
        self._squares[name] = (before[0] + lost.norm().item() ** 2, before[1] + delta.norm().item() ** 2)


def _ratio(squares: Iterable[tuple[float, float]]) -> float:
    lost, delta = (math.fsum(column) for column in zip(*squares, strict=True))
    return math.sqrt(lost / delta) if delta else 0.0
