"""To LoCon, the files of LyCORIS and kohya, exactly.

A Conv2d with a kernel becomes Tucker; for LyCORIS' own loader any convolution does. lora_up is its output factor,
lora_down the transpose of its input factor, and lora_mid the core at the kernel's size, G ×_3 C ×_4 D (equation 6), all
filled up with zeros to one rank R, since ComfyUI takes no other lora_mid than a square one:

    update = alpha / R · lora_mid ×_1 lora_up ×_2 lora_downᵀ,    alpha = R

    lora_up (out, R, 1 …), lora_mid (R, R, k …), lora_down (R, in/groups, 1 …)

All other layers, and all layers of a file that is ``folded``, become a product: lora_up (out, R, 1 …) and lora_down
(R, in/groups, k …). In a file without any lora_mid, alpha is 1 and lora_up holds the factor R: diffusers, which reads
such files, misreads alphas that differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flora import tucker
from flora.convert.adapter import Adapter, Update, finite, progress_bar
from flora.convert.diffusers import component_of, down_up, name_in, sources_of
from flora.convert.products import beside_obstacle, product, refuse
from flora.convert.readers import readers_of_locon
from flora.convert.sgm import is_sdxl, sdxl_name
from flora.files import new_file, save_tensors, user_path
from flora.layers.sites import Site

UP, MID, DOWN, ALPHA = "lora_up.weight", "lora_mid.weight", "lora_down.weight", "alpha"


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
            "lora_te"; with a second one, or a U-Net that is SDXL's by its layers, "lora_te1" and "lora_te2".
        folded: write no lora_mid, which diffusers does not know.
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
        source = Adapter.open(adapter)
        sdxl = text_encoder_2 is not None or is_sdxl(site.module for site in source.sites)
        encoders = {"lora_te1" if sdxl else "lora_te": text_encoder, "lora_te2": text_encoder_2}
        sources = _sources(source, prefix, encoders)
        tensors = _file_tensors(sources, sdxl, folded, progress)
        save_tensors(path, tensors | _idle_projections(tensors))
    weights = sum(key.endswith(UP) for key in tensors)
    line = f"{out}: LoCon, {weights} weights, {sum(map(Tensor.numel, tensors.values())) - weights:,} parameters"
    return f"{line}\n{readers_of_locon(list(sources), any(key.endswith(MID) for key in tensors))}"


def _sources(source: Adapter, prefix: str | None, encoders: dict[str, str | Path | None]) -> dict[str, Adapter]:
    """The adapters by the prefix of their tensors' names. Raises ValueError if one has layers without a LoCon form.

    Args:
        encoders: the text encoders' adapters by prefix, the first one's first; None for those that were not given.
    """
    if prefix is None:
        prefix = {"unet": "lora_unet", "text_encoder": next(iter(encoders))}.get(component_of(source) or "", "lycoris")
    sources = sources_of(source, prefix, encoders)
    for one in sources.values():
        obstacles = {site: reason for site in one.sites if (reason := locon_obstacle(site))}
        refuse(one, obstacles, "LoCon form", "`flora merge` writes them into the model")
    return sources


def _file_tensors(sources: dict[str, Adapter], sdxl: bool, folded: bool, progress: bool) -> dict[str, Tensor]:
    """All tensors of the file, by key."""
    shapes = ((prefix, one.shape(site)) for prefix, one in sources.items() for site in one.sites)
    with_mid = not folded and any(_is_tucker(*each) for each in shapes)
    tensors: dict[str, Tensor] = {}
    for prefix, source in sources.items():
        for update in progress_bar(source.updates(), len(source.sites), "export", progress):
            module = sdxl_name(update.site.module) if sdxl and prefix == "lora_unet" else update.site.module
            name = name_of(prefix, module)
            if f"{name}.{UP}" in tensors:
                raise ValueError(
                    f"{source.folder}: two layers would be {name!r} in the file, {update.site.name!r} is one"
                )
            own = _tensors(update, with_mid, with_mid and _is_tucker(prefix, update.shape))
            tensors |= {f"{name}.{end}": tensor for end, tensor in own.items()}
    return tensors


def _is_tucker(prefix: str, shape: Sequence[int]) -> bool:
    """Whether a layer has lora_mid. Of other kernels than those of Conv2d LyCORIS alone reads it."""
    return any(size != 1 for size in shape[2:]) and (len(shape) == 4 or not prefix.startswith("lora_"))


def _idle_projections(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for what an attention layer of SDXL's second text encoder lacks: A1111, where the four projections are one
    layer, reads all of them or none."""
    idle: dict[str, Tensor] = {}
    for key, down in tensors.items():
        layer, found, _ = key.partition("_self_attn_")
        if found and key.startswith("lora_te2_") and key.endswith(DOWN):
            width = down.shape[1]
            for name in (f"{layer}{found}{projection}" for projection in ("q_proj", "k_proj", "v_proj", "out_proj")):
                if f"{name}.{DOWN}" not in tensors:
                    pair = {f"{name}.{DOWN}": down.new_zeros(1, width), f"{name}.{UP}": down.new_zeros(width, 1)}
                    idle |= {**pair, f"{name}.{ALPHA}": torch.ones(())}
    return idle


def _tensors(update: Update, with_mid: bool, is_tucker: bool) -> dict[str, Tensor]:
    """One layer's tensors by the ends of their names. ``with_mid``: some layer of the file has lora_mid; ``is_tucker``:
    this one has."""
    ranks = update.ranks
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
