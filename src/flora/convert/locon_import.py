"""From LoCon, the files of LyCORIS and kohya, exactly: ``locon`` says what their tensors are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from flora.convert.adapter import Update, progress_bar, summary, write_adapter
from flora.convert.locon import ALPHA, DOWN, MID, UP, locon_obstacle, name_of
from flora.convert.products import cut_ranks, from_product, keys_by_layer
from flora.convert.readers import LOCON_PREFIX
from flora.convert.sgm import sgm_names
from flora.files import new_folder, open_tensors, user_path
from flora.layers import kinds
from flora.layers.sites import Site
from flora.models import empty_model
from flora.tuner.config import FloraConfig

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def import_locon(
    file: str | Path,
    base: nn.Module | str | Path,
    out: str | Path,
    *,
    prefix: str | None = None,
    progress: bool = False,
) -> str:
    """Write a LoCon file, Tucker or not, as a FLoRA adapter that gives the same outputs.

    Args:
        file: a .safetensors file. Files for SDXL may have the U-Net's original names (``input_blocks`` …).
        base: the model that it adapts, whose layers' names and shapes the file does not tell: the model itself (the
            meta device is enough), its folder, or its name on the hub.
        out: a new folder.
        prefix: the start of the names of the tensors to import. Needed if the file is for several models.
        progress: show a progress bar.

    Returns:
        a line that describes the adapter.

    Raises:
        ValueError: naming file, key and shape, if it is not a LoCon of this model (DoRA, LoHa, LoKr …).
        FileExistsError: if ``out`` exists.
    """
    path, updates = user_path(file), []
    model = base if isinstance(base, nn.Module) else empty_model(str(base))
    with open_tensors(path) as source:
        layers = keys_by_layer(source.keys())
        prefix = prefix or _only_prefix(path, layers)
        modules = _modules_by_name(model, prefix)
        names = [name for name in layers if name.startswith(f"{prefix}_")]
        if not names:
            raise ValueError(f"{path}: no key begins with '{prefix}_' (the first: {next(iter(layers), None)!r})")
        for name in progress_bar(names, len(names), "import", progress):
            check_ends(path, name, layers[name])
            tensors = {end: source.get_tensor(key) for end, key in layers[name].items()}
            try:
                updates.append(_update(model, modules.get(name, []), tensors))
            except ValueError as error:
                raise ValueError(f"{path}: {name!r}: {error}") from None
    # a regex: a list of names would also match all modules whose names end in one
    config = FloraConfig(r=1, target_modules="|".join(re.escape(update.site.module) for update in updates))
    with new_folder(out) as folder:
        write_adapter(folder, config, updates)
    return f"{out}: {summary(updates)}"


def _only_prefix(path: Path, names: Iterable[str]) -> str:
    matches = {name: LOCON_PREFIX.match(name) for name in names}
    if strange := [name for name, match in matches.items() if not match]:
        raise ValueError(
            f"{path}: {strange[0]!r} does not begin with lora_unet_, lora_te_, lora_te1_, lora_te2_ or lycoris_; for a "
            "LoCon of other names, give what precedes the layer's name by prefix="
        )
    prefixes = sorted({match[1] for match in matches.values() if match})
    if len(prefixes) != 1:
        raise ValueError(f"{path} is for {len(prefixes)} models ({', '.join(prefixes)}): choose one by prefix=")
    return prefixes[0]


def _modules_by_name(base: nn.Module, prefix: str) -> dict[str, list[str]]:
    """The modules of the base model that a name in the file may stand for."""
    modules: dict[str, list[str]] = {}
    others = sgm_names(base)
    for module, _ in base.named_modules():
        for name in {module, others.get(module, module)}:
            modules.setdefault(name_of(prefix, name), []).append(module)
    return modules


def check_ends(path: Path, name: str, keys: dict[str, str]) -> None:
    """Raise ValueError unless a layer's keys, by their ends, are those of a LoCon."""
    for end, key in keys.items():
        if end not in (UP, MID, DOWN, ALPHA):
            raise ValueError(f"{path}: {key!r} is not a LoCon's; {UP}, {MID}, {DOWN} and {ALPHA} are known")
    for end in (UP, DOWN):
        if end not in keys:
            raise ValueError(f"{path}: '{name}.{end}' is missing")


def _update(base: nn.Module, modules: Sequence[str], tensors: dict[str, Tensor]) -> Update:
    """The update of one layer. ``modules``: all modules of the base model that its name may stand for."""
    if len(modules) != 1:
        raise ValueError(f"may be {' or '.join(modules)}" if modules else "the base model has no such layer")
    (module,) = modules
    layer = base.get_submodule(module)
    kind, shape = kinds.describe(layer, "weight")
    site = Site.of(layer, kind, module, "weight")
    if reason := locon_obstacle(site):
        raise ValueError(f"{reason} ({module!r} is a {type(layer).__name__})")
    sizes = _sizes(tensors, shape)
    for end, size in sizes.items():
        if _trimmed(tensors[end].shape) != _trimmed(size) or 0 in size:
            actual = f"{end} has shape {list(tensors[end].shape)}"
            raise ValueError(f"{actual}; {list(size)} is needed for the weight {list(shape)} of {module!r}")
        if tensors[end].dtype not in DTYPES:
            raise ValueError(f"{end} has dtype {tensors[end].dtype}; one of {', '.join(map(str, DTYPES))} is needed")
    dtype = reduce(torch.promote_types, (tensors[end].dtype for end in sizes))
    down, up, *mid = (tensors[end].to(dtype).reshape(size) for end, size in sizes.items())
    if mid:
        identities = [torch.eye(size, dtype=dtype) for size in shape[2:]]
        core, factors = cut_ranks(mid[0], [up, down.mT, *identities])
    else:
        core, factors = from_product(up, down)
    return Update(site, core, tuple(factors), scale_of(tensors.get(ALPHA), down.shape[0]))


def _sizes(tensors: dict[str, Tensor], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors must have, apart from ones at the end."""
    out, inputs, *kernel = shape
    if MID not in tensors:
        rank = (*tensors[DOWN].shape, 1)[0]
        return {DOWN: (rank, inputs, *kernel), UP: (out, rank)}
    r_out, r_in = (*tensors[MID].shape, 1, 1)[:2]
    return {DOWN: (r_in, inputs), UP: (out, r_out), MID: (r_out, r_in, *kernel)}


def _trimmed(shape: Sequence[int]) -> list[int]:
    """Without the ones at the end, in which linear layers and 1×1 convolutions differ."""
    sizes = list(shape)
    while sizes[-1:] == [1]:
        sizes.pop()
    return sizes


def scale_of(alpha: Tensor | None, rank: int) -> float:
    """alpha / rank; without alpha, 1."""
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not math.isfinite(alpha):
        raise ValueError(f"{ALPHA} is {alpha.tolist()}; a finite number is needed")
    return (alpha.item() or rank) / rank  # LyCORIS and kohya read 0 as the rank
