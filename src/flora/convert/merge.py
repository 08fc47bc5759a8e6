"""A model with an adapter merged in, in the base model's own format, shard by shard: no model has to be in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from flora import tucker
from flora.convert.adapter import PREFIX, Adapter, Update, bar
from flora.convert.checkpoint import Checkpoint, MissingWeight, full_key
from flora.files import WEIGHTS, new_folder, read_json, replace_file
from flora.layers.core_space import add_updates
from flora.layers.cost import LOW_PRECISION
from flora.models import meta_model, shared_parameters

FLOATS = (torch.float64, torch.float32, *LOW_PRECISION)
# weights in any format, which would still be the base's; those of a training run; an adapter's
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite", ".npz"),
}
NOT_COPIED = (".*", "*.index.json", "*.index.*.json", "adapter_config.json", "trainer_state.json")
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Report:
    """What was written.

    ``merged``: the layers. ``replaced``: weights that the adapter holds whole (trained heads, biases). ``new``: those
    of them that the base lacks or has in another shape. ``untied``: weights that were one in the base. ``lost``: by
    layer, the part of the update that the base's number format rounded away, ‖(stored - W) - delta‖ / ‖delta‖; empty
    for float32 and wider. ``lost_in_all``: the same of all these layers together.
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
            lines.append(f"no longer tied, and {TIE} is false now: {', '.join(self.untied)}")
        if self.lost_in_all is not None:
            lines.append(f"rounding took {self.lost_in_all:.2%} of the updates; the most:")
            worst = sorted(self.lost, key=self.lost.__getitem__, reverse=True)[:5]
            lines += [f"  {self.lost[name]:8.2%}  {name}" for name in worst]
        return "\n".join(lines)


@torch.no_grad()
def merge(
    base: str | Path, adapter: str | Path, out: str | Path, *, max_shard_size: int | str = "5GB", progress: bool = False
) -> Report:
    """Write ``base`` with the updates of a FLoRA adapter in its weights.

    ``base`` is a folder of transformers, diffusers or timm, a file of weights, or a name on the hub. ``out`` is a new
    folder with safetensors under the names that the base's library looks for, in shards of at most ``max_shard_size``
    bytes, and with the base's other files (a base that is a single file has none). An ``out`` that ends in
    ".safetensors" is one file, with the weights alone.

    Every weight keeps its number format; the sum is formed in float32 at least and rounded once. What the adapter holds
    whole (``modules_to_save``, biases) takes the place of the base's. A tied weight of which only one name was adapted
    becomes two, and the config says so.

    Raises:
        ValueError: naming layer, key, file and shapes, before anything is written; or where a merged weight is not
            finite, with nothing left.
        FileExistsError: where ``out`` exists.
    """
    target = Path(out)
    if target.suffix == ".safetensors":
        if target.exists():
            raise FileExistsError(f"{target} exists already; name a new file, or remove it first")
        plan = _Plan(base, adapter)
        with replace_file(target) as path:
            plan.write(path, list(plan.entries), target.name, progress)
        return plan.report(target, [target.name])
    with new_folder(target) as folder:
        plan = _Plan(base, adapter, folder)
        split, stem = plan.shards(max_shard_size)
        if plan.base.folder is not None:
            _copy_others(plan.base.folder, folder)
        for name, keys in split.filename_to_tensors.items():
            plan.write(folder / name, keys, name, progress)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / f"{stem}.safetensors.index.json", index)
    return plan.report(target, list(split.filename_to_tensors))


def merged_weight(update: Update, weight: Tensor) -> Tensor:
    """``weight + update``, both (I_1, …, I_N), in the weight's dtype: summed in float32 at least, just as the layer's
    own merge does it."""
    return add_updates(weight, [_space(update, weight.dtype)])


def _space(update: Update, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Scaled core and factors in the type that the sum with a weight of ``dtype`` is formed in."""
    wide = torch.promote_types(dtype, torch.float32)
    return update.core.to(wide) * update.scale, [factor.to(wide) for factor in update.factors]


# ----------------------------------------------------------------------------------------------------------- the plan


@dataclass
class _Entry:
    """One tensor of the merged model.

    ``origin``: a key of the base, or a tensor of the adapter. ``update``: what is added. ``whole``: whether the tensor
    is the update's weight as it is in the model; else that is converted to what lies on disk (``Checkpoint.pieces``).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str | Tensor
    update: Update | None = None
    whole: bool = True

    @property
    def changed(self) -> bool:
        return self.update is not None or isinstance(self.origin, Tensor)


class _Plan:
    """All that will be written, by key; made, and so checked, before any weight is. ``folder`` takes a config, where it
    is no longer the base's."""

    def __init__(self, base: str | Path, adapter: str | Path, folder: Path | None = None) -> None:
        self.adapter = Adapter.open(adapter)
        config = self.adapter.config
        revision = config.revision if str(base) == config.base_model_name_or_path else None
        self.base = Checkpoint.open(base, revision)
        self.entries = {key: self._entry(key) for key in self.base.keys()}
        self.untied: list[str] = []
        self._squares: dict[str, tuple[float, float]] = {}  # of what rounding took and of the update, by layer
        self._parts: dict[str, Tensor] = {}  # of converted updates, until they are written

        absent = {}  # tied weights that lie under another name alone
        for group in self.base.ties:
            present = next(key for key in group if key in self.entries)
            absent |= {key: self._entry(present) for key in group if key not in self.entries}
        self.entries |= absent
        others = self.adapter.other_tensors()
        for key in sorted(others, key=_is_frozen, reverse=True):
            self._replace(key, others[key])
        for update in self.adapter.updates():
            self._add(update)
        for group in self.base.ties:
            if any(self.entries[key].changed for key in group) and not self._still_one(group):
                self._untie(group, folder if self.base.folder is not None else None)
        if not self.untied:
            for key in absent:
                del self.entries[key]

    def _entry(self, key: str) -> _Entry:
        return _Entry(self.base.shape(key), self.base.dtype(key), key)

    def _pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name in self.entries and name not in self.base:  # tied
            return {name: tensor}
        module, _, parameter = name.rpartition(".")
        return self.base.pieces(module, parameter, tensor)

    def _replace(self, key: str, tensor: Tensor) -> None:
        """Put a tensor that the adapter holds whole in the place of the base's."""
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
        for place, piece in pieces.items():
            group = next((group for group in self.base.ties if place in group), [place])
            for twin in group if _is_frozen(key) else [place]:
                self._put(twin, piece)

    def _put(self, key: str, tensor: Tensor) -> None:
        entry = self.entries.get(key)
        if entry is not None:
            if tensor.is_floating_point():
                self._check_dtype(key, entry)
            tensor = tensor.to(entry.dtype)
            if entry.shape == tensor.shape and torch.equal(tensor, self._origin(entry)):
                return
        self.entries[key] = _Entry(tuple(tensor.shape), tensor.dtype, tensor)

    def _origin(self, entry: _Entry) -> Tensor:
        """A tensor of its own, as safetensors wants it."""
        if isinstance(entry.origin, str):
            return self.base.tensor(entry.origin)
        return entry.origin.clone(memory_format=torch.contiguous_format)

    def _add(self, update: Update) -> None:
        file, layer = self.adapter.folder / WEIGHTS, update.site.name
        if not all(torch.isfinite(tensor).all() for tensor in (update.core, *update.factors)):
            raise ValueError(f"{file}: layer {layer!r}, shape {list(update.shape)}: core or factors are not finite")
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

    def _check_dtype(self, key: str, entry: _Entry) -> None:
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{key!r} of {self.base.source} has dtype {entry.dtype}: a quantized model can't be merged; name the "
                "one that it was made of"
            )

    # --------------------------------------------------------------------------------------------------- tied weights

    def _still_one(self, group: Sequence[str]) -> bool:
        entries = [self.entries[key] for key in group]
        first = entries[0].origin
        return all(
            entry.update is None and isinstance(entry.origin, Tensor) and torch.equal(entry.origin, first)
            for entry in entries
        )

    def _untie(self, group: list[str], folder: Path | None) -> None:
        """Say in the config that the weights of the group, which are no longer equal, are not one."""
        head = f"{' and '.join(group)} are one tied weight of {self.base.source}, and would no longer be equal; "
        if self.base.model is None or folder is None:
            raise ValueError(
                head + "the config.json of a transformers model's folder could say so: merge that to a folder"
            )
        # an encoder-decoder takes the same flag for more than the tying
        if len(group) > 2 or self.base.model.config.is_encoder_decoder:
            raise ValueError(head + "this model can't be without the tie: leave these weights out of the adapter")
        config = folder / "config.json"
        _write_json(config, {**_without_tie(read_json(self.base.folder / "config.json")), TIE: False})
        if shared_parameters(meta_model(config)):
            raise ValueError(head + f"{TIE}=False does not untie this model: leave these weights out of the adapter")
        self.untied += group

    # ------------------------------------------------------------------------------------------------------- writing

    def shards(self, max_shard_size: int | str) -> tuple[StateDictSplit, str]:
        """Which key goes into which file, and what the files' names begin with."""
        sizes = {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in self.entries.items()}
        first = next(iter(self.base.files.values())).name
        stem = "diffusion_pytorch_model" if first.startswith("diffusion_pytorch_model") else "model"
        pattern = stem + "{suffix}.safetensors"
        try:
            if not isinstance(max_shard_size, str) and max_shard_size < 1:
                raise ValueError("at least a byte is needed")
            return split_torch_state_dict_into_shards(
                sizes, filename_pattern=pattern, max_shard_size=max_shard_size
            ), stem
        except ValueError as error:
            raise ValueError(f"max_shard_size={max_shard_size!r}: {error}") from None

    def write(self, path: Path, keys: Sequence[str], label: str, progress: bool) -> None:
        tensors = {key: self._tensor(key) for key in bar(keys, len(keys), label, progress)}
        save_file(tensors, path, metadata={"format": "pt", **self.base.metadata})

    def _tensor(self, key: str) -> Tensor:
        entry = self.entries[key]
        weight = self._origin(entry)
        if entry.update is None:
            return weight
        core, factors = _space(entry.update, entry.dtype)
        low = entry.dtype in LOW_PRECISION
        if entry.whole:
            merged = merged_weight(entry.update, weight)
            delta = tucker.reconstruct(core, factors) if low else None
        else:
            if key not in self._parts:
                site = entry.update.site
                self._parts |= self.base.pieces(site.module, site.parameter, tucker.reconstruct(core, factors))
            delta = self._parts.pop(key)
            merged = (weight.to(core.dtype) + delta).to(entry.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"layer {entry.update.site.name!r}: {key!r} with the update is not finite in {entry.dtype}, shape "
                f"{list(entry.shape)}"
            )
        if low:
            self._measure(entry.update.site.name, merged.float() - weight.float() - delta, delta)
        return merged.contiguous()

    def _measure(self, layer: str, lost: Tensor, delta: Tensor) -> None:
        before = self._squares.get(layer, (0.0, 0.0))
        self._squares[layer] = (before[0] + lost.norm().item() ** 2, before[1] + delta.norm().item() ** 2)

    def report(self, out: Path, files: list[str]) -> Report:
        squares = self._squares.values()
        replaced = {key: list(entry.shape) for key, entry in self.entries.items() if isinstance(entry.origin, Tensor)}
        return Report(
            out=out,
            files=files,
            merged=[site.name for site in self.adapter.sites],
            replaced=list(replaced),
            new={
                key: shape
                for key, shape in replaced.items()
                if key not in self.base or shape != list(self.base.shape(key))
            },
            untied=self.untied,
            lost={layer: _ratio([pair]) for layer, pair in self._squares.items()},
            lost_in_all=_ratio(squares) if squares else None,
        )


def _is_frozen(key: str) -> bool:
    """Whether it is the weight or bias of an adapted layer, which PEFT saves of embeddings and with ``bias``. Of a tied
    weight it stands for all its names."""
    return ".base_layer." in key


def _ratio(squares: Iterable[tuple[float, float]]) -> float:
    lost, delta = (math.fsum(column) for column in zip(*squares, strict=True))
    return math.sqrt(lost / delta) if delta else 0.0


def _without_tie(content: dict[str, Any]) -> dict[str, Any]:
    """The config with every flag that ties embeddings off, also in the configs inside it."""
    return {
        key: _without_tie(value) if isinstance(value, dict) else False if key == TIE else value
        for key, value in content.items()
    }


# ----------------------------------------------------------------------------------------------- the base's other files


def _copy_others(base: Path, folder: Path) -> None:
    """All that is no weights: config, tokenizer, processor, code. Subfolders too, those with weights only where a
    sentence-transformers model names them as its further layers: others hold copies of the base, or checkpoints."""
    modules = _modules(base)
    for path in sorted(base.iterdir()):
        if any(path.match(pattern) for pattern in NOT_COPIED) or (path.is_file() and _is_weights(path)):
            continue
        if path.is_file():
            if not (folder / path.name).exists():  # a config that had to change
                shutil.copyfile(path, folder / path.name)
        elif path.name in modules or not any(map(_is_weights, path.rglob("*"))):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(".*"))


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES


def _modules(base: Path) -> set[str]:
    path = base / "modules.json"
    try:
        return {module["path"] for module in json.loads(path.read_text())} if path.is_file() else set()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as sentence-transformers writes it: {error!r}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
