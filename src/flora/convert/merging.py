"""A model with an adapter merged in, in the base model's own format, shard by shard: no model has to be in memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flora.convert.adapter import Adapter
from flora.convert.checkpoint import Checkpoint
from flora.convert.merge_writer import MergeWriter, shards
from flora.convert.merged_model import MergedModel
from flora.convert.other_files import copy_other_files
from flora.convert.ties import TIE, untie
from flora.files import new_file, new_folder, user_path


@dataclass(frozen=True)
class MergeReport:
    """What ``merge`` wrote.

    Args:
        out: the folder or file.
        files: names of the files with weights.
        merged: names of the adapted weights.
        replaced: keys of the weights that the adapter holds whole (trained heads, biases).
        new: keys and shapes of those of them that the base lacks or has in another shape.
        untied: keys of the weights that were tied in the base and no longer are.
        lost: per adapted weight, the share of the update that rounding to the base's dtype lost,
            ‖(stored - W) - delta‖ / ‖delta‖. Empty for float32 and wider.
        lost_in_all: the same for all these weights together; None if ``lost`` is empty.
    """

    out: Path
    files: list[str]
    merged: list[str]
    replaced: list[str] = field(default_factory=list)
    new: dict[str, list[int]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    lost: dict[str, float] = field(default_factory=dict)
    lost_in_all: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"out": str(self.out)}

    def __str__(self) -> str:
        replaced = f", {len(self.replaced)} replaced" if self.replaced else ""
        count = f"{len(self.files)} file" + "s" * (len(self.files) != 1)
        lines = [f"{self.out}: {len(self.merged)} weights merged{replaced}, {count}"]
        if self.new:
            shapes = ", ".join(f"{key} {shape}" for key, shape in self.new.items())
            lines.append(f"new, or of another shape than the base's (load with a config that fits): {shapes}")
        if self.untied:
            lines.append(f"no longer tied, and {TIE} is now false: {', '.join(self.untied)}")
        if self.lost_in_all is not None:
            lines.append(f"rounding lost {self.lost_in_all:.2%} of the updates; the largest shares:")
            worst = sorted(self.lost, key=self.lost.__getitem__, reverse=True)[:5]
            lines += [f"  {self.lost[name]:8.2%}  {name}" for name in worst]
        return "\n".join(lines)


@torch.no_grad()
def merge(
    base: str | Path, adapter: str | Path, out: str | Path, *, max_shard_size: int | str = "5GB", progress: bool = False
) -> MergeReport:
    """Write a model with the updates of a FLoRA adapter in its weights.

    Every weight keeps its dtype. The sum is formed in float32 at least and rounded once. Tensors that the adapter holds
    whole (``modules_to_save``, biases) replace the base's. If only one name of a tied weight was adapted, the weight is
    untied, and the config says so.

    Args:
        base: a folder of transformers, diffusers or timm, a file of weights, or a name on the hub.
        adapter: a folder, or a name on the hub.
        out: a new folder. It gets safetensors under the names that the base's library looks for, and copies of the
            base's other files (if the base is a folder). An ``out`` that ends in ".safetensors" becomes one file with
            the weights only.
        max_shard_size: the largest number of bytes per file of weights, also as "5GB".
        progress: show progress bars.

    Raises:
        ValueError: naming layer, key, file and shapes, before any weight is written; or if a merged weight is not
            finite. Nothing is left then.
        FileExistsError: if ``out`` exists.
    """
    target = user_path(out)
    if target.suffix == ".safetensors":
        with new_file(target) as path:
            model = _merged_model(base, adapter)
            untie(model, None)
            writer = MergeWriter(model)
            writer.write(path, list(model.entries), target.name, progress)
        return _report(model, writer, target, [target.name])
    with new_folder(target) as folder:
        model = _merged_model(base, adapter)
        untie(model, folder)
        split, stem = shards(model, max_shard_size)
        if model.base.folder is not None:
            copy_other_files(model.base.folder, folder)
        writer = MergeWriter(model)
        for name, keys in split.filename_to_tensors.items():
            writer.write(folder / name, keys, name, progress)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return _report(model, writer, target, list(split.filename_to_tensors))


def _merged_model(base: str | Path, adapter: str | Path) -> MergedModel:
    source = Adapter.open(adapter)
    config = source.config
    revision = config.revision if str(base) == config.base_model_name_or_path else None
    return MergedModel(Checkpoint.open(base, revision), source)


def _report(model: MergedModel, writer: MergeWriter, out: Path, files: list[str]) -> MergeReport:
    replaced = {key: list(entry.shape) for key, entry in model.entries.items() if entry.replaced}
    base = model.base
    return MergeReport(
        out=out,
        files=files,
        merged=[site.name for site in model.adapter.sites],
        replaced=list(replaced),
        new={key: shape for key, shape in replaced.items() if key not in base or shape != list(base.shape(key))},
        untied=[key for group in model.untied for key in group],
        lost=writer.lost(),
        lost_in_all=writer.lost_in_all(),
    )
