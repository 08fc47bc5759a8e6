"""To diffusers: a plain LoRA, ``pytorch_lora_weights.safetensors``, in one file for all parts of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flora.convert.adapter import Adapter
from flora.convert.lora import lora_of, obstacle
from flora.convert.products import Product, refuse
from flora.files import new_folder
from flora.layers.sites import Site

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # in the file's header: the arguments of LoraConfig, part by part
UNET = (
    "conv_in", "conv_out", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "down_blocks",
    "mid_block", "up_blocks",
)  # fmt: skip
CLIP_TEXT = ("text_model", "text_projection")


def export_diffusers(
    adapter: str | Path,
    out: str | Path,
    *,
    component: str | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    progress: bool = False,
) -> str:
    """Write FLoRA adapters as a LoRA that gives the same outputs in diffusers: ``pipeline.load_lora_weights(out)``, or
    ``model.load_lora_adapter(out, prefix=component, use_safetensors=True)``.

    Args:
        component: the part of the pipeline that ``adapter`` is of; without it "unet", "transformer" or "text_encoder",
            as its layers' names tell.
        text_encoder, text_encoder_2: adapters of those parts, for the same file.

    Returns:
        what was written, in a line.

    Raises:
        ValueError: with the layers that have no LoRA form, or what else is in the adapter; nothing is written then.
    """
    source = Adapter.open(adapter)
    component = component or component_of(source)
    if component is None:
        raise ValueError(f"{adapter}: its layers do not tell the part of the pipeline; name it by component=")
    parts = parts_of(source, component, {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2})
    tensors: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    for part, source in parts.items():
        some, config = _part(source, part, progress)
        tensors |= {f"{part}.{name}": tensor for name, tensor in some.items()}
        arguments |= {f"{part}.{name}": value for name, value in config.items()}
    with new_folder(Path(out)) as folder:
        save_file(tensors, folder / FILE, metadata={"format": "pt", METADATA: json.dumps(arguments)})
    ranks = ", ".join(f"{part} of rank {arguments[f'{part}.r']}" for part in parts)
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{out}: LoRA, {ranks}, {len(tensors) // 2} weights, {count:,} parameters"


def _part(source: Adapter, part: str, progress: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the arguments of LoraConfig."""
    reasons = {site: reason for site in source.sites if (reason := _obstacle(site))}
    refuse(source, reasons, "LoRA form in diffusers", "`flora merge` writes them into the model")
    pairs, config = lora_of(source, ragged=False, progress=progress)
    # PEFT's names, but for text encoders, where diffusers knows them of attention only
    ends = ("lora_linear_layer.down", "lora_linear_layer.up") if "text_encoder" in part else ("lora_A", "lora_B")
    tensors = {
        f"{name_in(part, site.module)}.{end}.weight": tensor
        for site, pair in pairs.items()
        for end, tensor in zip(ends, down_up(pair), strict=True)
    }
    # endings of names, which hold with CLIP's extra level and without it
    names = [site.module.removeprefix("text_model.") for site in pairs]
    return tensors, {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": names}


def _obstacle(site: Site) -> str | None:
    if site.kind.locon_form is None:  # the same layers
        return f"diffusers knows LoRA of linear layers and convolutions, not of {site.kind.name}"
    return obstacle(site, ())


# --------------------------------------------------------------------------------------- what LoCon files share with it


def component_of(source: Adapter) -> str | None:
    """The part of a pipeline that the adapter is of, by its layers' names and its model's class; None for another."""
    tops = {site.module.partition(".")[0] for site in source.sites}
    model = (source.config.auto_mapping or {}).get("base_model_class") or ""
    if tops <= set(UNET):
        return "unet"
    if tops <= set(CLIP_TEXT) or model.startswith("CLIPTextModel"):
        return "text_encoder"
    if "Transformer" in model or any(top.endswith("transformer_blocks") for top in tops):
        return "transformer"
    return None


def parts_of(source: Adapter, name: str, others: dict[str, str | Path | None]) -> dict[str, Adapter]:
    """The adapters for one file, by what their tensors' names begin with.

    Raises:
        ValueError: where two would begin alike, or one holds more than updates of weights.
    """
    if others.get(name) is not None:
        raise ValueError(f"{source.folder} and {others[name]} would both be {name!r} in the file")
    parts = {name: source} | {other: Adapter.open(folder) for other, folder in others.items() if folder is not None}
    for part in parts.values():
        if part.rest:
            raise ValueError(
                f"{part.folder}: {len(part.rest)} tensors, such as {part.rest[0]!r}, are no updates of weights; the "
                "file has no place for them"
            )
    return parts


def name_in(part: str, module: str) -> str:
    """The module's name in a file: of CLIP's text model with a level that transformers 5 has no more."""
    flat = part.startswith(("text_encoder", "lora_te")) and module.startswith("encoder.layers.")
    return f"text_model.{module}" if flat else module


def down_up(pair: Product) -> tuple[Tensor, Tensor]:
    """(out, q) and (q, in, k …) -> (q, in, k …) and (out, q, 1 …), as linear layers and convolutions have them."""
    left, right = pair
    return right.contiguous(), left.reshape(*left.shape, *[1] * (right.ndim - 2)).contiguous()
