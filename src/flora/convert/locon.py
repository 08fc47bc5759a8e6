"""To and from LoCon, the files of LyCORIS and kohya, exactly.

A convolution with a kernel becomes Tucker. lora_up is its output factor, lora_down the transpose of its input factor,
and lora_mid the core at the kernel's size, G ×_3 C ×_4 D (equation 6), all filled up with zeros to one rank R:

    update = alpha / R · lora_mid ×_1 lora_up ×_2 lora_downᵀ,    alpha = R

    lora_up (out, R, 1 …), lora_mid (R, R, k …), lora_down (R, in/groups, 1 …)

All other layers, and all layers of a file that is ``folded``, become a product: lora_up (out, R, 1 …) and lora_down
(R, in/groups, k …). In a file without any lora_mid, alpha is 1 and lora_up holds the factor R: diffusers, which reads
such files, misreads alphas that differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora import tucker
from flora.convert.adapter import Adapter, Update, finite, progress_bar, summary, write_adapter
from flora.convert.diffusers import component_of, down_up, name_in, sources_of
from flora.convert.products import beside_obstacle, cut_ranks, from_product, keys_by_layer, product, refuse
from flora.convert.readers import LOCON_PREFIX, readers_of_locon
from flora.convert.sgm import sgm_names
from flora.files import new_file, new_folder, open_tensors, save_tensors, user_path
from flora.layers import kinds
from flora.layers.sites import Site
from flora.models import empty_model
from flora.tuner.config import FloraConfig

UP, MID, DOWN, ALPHA = "lora_up.weight", "lora_mid.weight", "lora_down.weight", "alpha"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def locon_obstacle(site: Site) -> str | None:
    """Why LoCon has no form for this update that loads and is exact; None if it has one."""
    if site.kind.locon_form is None:
        return f"LoCon has no form for {site.kind.name}"
    # unless merged, LyCORIS runs it beside the layer, with the layer's stride, padding, dilation and groups
    padded = site.padding_mode != "zeros"
    return beside_obstacle(site) or (f"LyCORIS ignores padding_mode={site.padding_mode!r}" if padded else None)


def name_of(prefix: str, module: str) -> str:
    """The start of the names of a module's tensors."""
    return f"{prefix}_{name_in(prefix, module)}".replace(".", "_")


# --------------------------------------------------------------------------------------------------------------- export


def export_locon(
    adapter: str | Path,
    out: str | Path,
    *,
    prefix: str | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    folded: bool = False,
    progress: bool = False,
) -> str:
    """Write FLoRA adapters as a LyCORIS / kohya LoCon file that gives the same outputs.

    Args:
        adapter: a folder, or a name on the hub.
        out: a new .safetensors file.
        prefix: the start of the tensors' names. By default "lora_unet" for diffusers' U-Nets, "lora_te" for CLIP's
            text model and "lycoris" for any other model.
        text_encoder, text_encoder_2: adapters of a pipeline's text encoders, for the same file. Their prefix is
            "lora_te"; if there is a second one, "lora_te1" and "lora_te2".
        folded: write no lora_mid, which diffusers does not know, and most programs only of Conv2d.
        progress: show a progress bar.

    Returns:
        a line that describes the LoCon, and one that says which programs read it.

    Raises:
        ValueError: listing the layers without a LoCon form, or tensors for which the file has no place. Nothing is
            written then.
        FileExistsError: if ``out`` exists.
    """
    if user_path(out).suffix != ".safetensors":
        raise ValueError(f"{out}: the name must end in .safetensors")
    with new_file(out) as path:
        sources = _sources(Adapter.open(adapter), prefix, text_encoder, text_encoder_2)
        tensors = _file_tensors(sources, folded, progress)
        save_tensors(path, tensors)
    weights = sum(key.endswith(UP) for key in tensors)
    line = f"{out}: LoCon, {weights} weights, {sum(map(Tensor.numel, tensors.values())) - weights:,} parameters"
    return f"{line}\n{readers_of_locon(list(sources), any(key.endswith(MID) for key in tensors))}"


def _sources(
    source: Adapter, prefix: str | None, text_encoder: str | Path | None, text_encoder_2: str | Path | None
) -> dict[str, Adapter]:
    """The adapters by the prefix of their tensors' names. Raises ValueError if one has layers without a LoCon form."""
    encoder = "lora_te" if text_encoder_2 is None else "lora_te1"
    if prefix is None:
        prefix = {"unet": "lora_unet", "text_encoder": encoder}.get(component_of(source) or "", "lycoris")
    sources = sources_of(source, prefix, {encoder: text_encoder, "lora_te2": text_encoder_2})
    for one in sources.values():
        obstacles = {site: reason for site in one.sites if (reason := locon_obstacle(site))}
        refuse(one, obstacles, "LoCon form", "`flora merge` writes them into the model")
    return sources


def _file_tensors(sources: dict[str, Adapter], folded: bool, progress: bool) -> dict[str, Tensor]:
    """All tensors of the file, by key."""
    with_mid = not folded and any(_has_kernel(one.shape(site)) for one in sources.values() for site in one.sites)
    tensors: dict[str, Tensor] = {}
    for prefix, source in sources.items():
        for update in progress_bar(source.updates(), len(source.sites), "export", progress):
            name = name_of(prefix, update.site.module)
            if f"{name}.{UP}" in tensors:
                raise ValueError(
                    f"{source.folder}: two layers would be {name!r} in the file, {update.site.name!r} is one"
                )
            tensors |= {f"{name}.{end}": tensor for end, tensor in _tensors(update, with_mid).items()}
    return tensors


def _has_kernel(shape: Sequence[int]) -> bool:
    return any(size != 1 for size in shape[2:])


def _tensors(update: Update, with_mid: bool) -> dict[str, Tensor]:
    """One layer's tensors by the ends of their names. ``with_mid``: some layer of the file has lora_mid."""
    ranks = update.ranks
    is_tucker = with_mid and _has_kernel(update.shape)
    rank = max(ranks[:2]) if is_tucker else min(ranks[0], math.prod(ranks[1:]))
    alpha = rank if with_mid else 1
    update = replace(update, scale=update.scale * rank / alpha)
    if not is_tucker:
        down, up = down_up(product(update))
        tensors = {DOWN: down, UP: up}
    else:
        mid, (up, down, *kernel) = update.scaled_space()
        for mode, factor in enumerate(kernel, 2):
            mid = tucker.mode_product(mid, factor, mode)
        ones = [1] * len(kernel)
        tensors = {
            DOWN: F.pad(down, (0, rank - ranks[1])).mT.reshape(rank, -1, *ones),
            MID: F.pad(mid, (*[0, 0] * len(kernel), 0, rank - ranks[1], 0, rank - ranks[0])),
            UP: F.pad(up, (0, rank - ranks[0])).reshape(-1, rank, *ones),
        }
    tensors = {name: tensor.to(update.dtype).contiguous() for name, tensor in tensors.items()}
    finite(f"layer {update.site.name!r}", tensors)
    return {**tensors, ALPHA: torch.tensor(float(alpha))}


# --------------------------------------------------------------------------------------------------------------- import


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
