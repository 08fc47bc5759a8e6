"""To diffusers: a plain LoRA, ``pytorch_lora_weights.safetensors``, in one file for all components of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from flora.convert.adapter import Adapter
from flora.convert.lora import lora_obstacle, lora_of
from flora.convert.products import Product, refuse
from flora.files import new_folder, save_tensors
from flora.layers.sites import Site

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # in the file's header: the arguments of LoraConfig per component
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
        adapter: a folder, or a name on the hub.
        out: a new folder.
        component: the component of the pipeline that ``adapter`` adapts. By default "unet", "transformer" or
            "text_encoder", told by its layers' names.
        text_encoder, text_encoder_2: adapters of those components, for the same file.
        progress: show a progress bar.

    Returns:
        a line that describes the LoRA, and one that says how diffusers loads it.

    Raises:
        ValueError: listing the layers without a LoRA form, or tensors for which the file has no place. Nothing is
            written then.
        FileExistsError: if ``out`` exists.
    """
    source = Adapter.open(adapter)
    component = component or component_of(source)
    if component is None:
        raise ValueError(f"{adapter}: its layers do not tell the component of the pipeline; name it by component=")
    sources = sources_of(source, component, {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2})
    tensors: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    for name, one in sources.items():
        own_tensors, own_arguments = _component_lora(one, name, progress)
        tensors |= {f"{name}.{key}": tensor for key, tensor in own_tensors.items()}
        arguments |= {f"{name}.{key}": value for key, value in own_arguments.items()}
    with new_folder(out) as folder:
        save_tensors(folder / FILE, tensors, {METADATA: json.dumps(arguments)})
    ranks = ", ".join(f"{name} of rank {arguments[f'{name}.r']}" for name in sources)
    count = sum(tensor.numel() for tensor in tensors.values())
    reader = f"for diffusers: pipeline.load_lora_weights({str(out)!r})"
    return f"{out}: LoRA, {ranks}, {len(tensors) // 2} weights, {count:,} parameters\n{reader}"


def _component_lora(source: Adapter, component: str, progress: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A component's tensors by name, and the arguments of its LoraConfig."""
    obstacles = {site: reason for site in source.sites if (reason := _obstacle(site))}
    refuse(source, obstacles, "LoRA form in diffusers", "`flora merge` writes them into the model")
    products, config = lora_of(source, ragged=False, progress=progress)
    # PEFT's names; but of text encoders diffusers knows PEFT's names of attention layers only
    ends = ("lora_linear_layer.down", "lora_linear_layer.up") if "text_encoder" in component else ("lora_A", "lora_B")
    tensors = {
        f"{name_in(component, site.module)}.{end}.weight": tensor
        for site, pair in products.items()
        for end, tensor in zip(ends, down_up(pair), strict=True)
    }
    # diffusers matches the ends of names; these match with CLIP's extra level and without it
    names = [site.module.removeprefix("text_model.") for site in products]
    return tensors, {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": names}


def _obstacle(site: Site) -> str | None:
    if site.kind.locon_form is None:  # diffusers takes the same layers as LoCon
        return f"diffusers takes LoRA of linear layers and convolutions, not of {site.kind.name}"
    return lora_obstacle(site, ())


# ---------------------------------------------------------------------------------------------- shared with LoCon files


def component_of(source: Adapter) -> str | None:
    """The component of a pipeline that an adapter adapts, by its layers' names and its model's class. None if they do
    not tell."""
    tops = {site.module.partition(".")[0] for site in source.sites}
    model = (source.config.auto_mapping or {}).get("base_model_class") or ""
    if tops <= set(UNET):
        return "unet"
    if tops <= set(CLIP_TEXT) or model.startswith("CLIPTextModel"):
        return "text_encoder"
    if "Transformer" in model or any(top.endswith("transformer_blocks") for top in tops):
        return "transformer"
    return None


def sources_of(source: Adapter, prefix: str, others: dict[str, str | Path | None]) -> dict[str, Adapter]:
    """The adapters of one file by the prefix of their tensors' names.

    Args:
        source, prefix: the first adapter, and its prefix.
        others: further adapters by prefix, None for those that the user did not give.

    Raises:
        ValueError: if two have the same prefix, or one holds more than updates of weights.
    """
    if others.get(prefix) is not None:
        raise ValueError(f"{source.folder} and {others[prefix]} would both be {prefix!r} in the file")
    sources = {prefix: source} | {name: Adapter.open(other) for name, other in others.items() if other is not None}
    for one in sources.values():
        if keys := one.other_keys:
            raise ValueError(
                f"{one.folder}: {len(keys)} tensors, such as {keys[0]!r}, are not updates of weights; the file has no "
                "place for them"
            )
    return sources


def name_in(prefix: str, module: str) -> str:
    """A module's name in a file. CLIP's text model has one level more there than in transformers 5."""
    flat = prefix.startswith(("text_encoder", "lora_te")) and module.startswith("encoder.layers.")
    return f"text_model.{module}" if flat else module


def down_up(pair: Product) -> tuple[Tensor, Tensor]:
    """(out, q) and (q, in, k …) -> (q, in, k …) and (out, q, 1 …): the weights of two layers, as LoRA's files have."""
    left, right = pair
    return right.contiguous(), left.reshape(*left.shape, *[1] * (right.ndim - 2)).contiguous()
