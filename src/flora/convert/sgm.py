"""The names of a U-Net's layers in Stability's own code. Files for SDXL have them: by diffusers' names A1111 does not
find all of SDXL's layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
# SD 1 and 2 have one transformer block per attention and none on the lowest level; SDXL's refiner has a level more
ONLY_SDXL = re.compile(r"add_embedding\..+|up_blocks\.0\.attentions\..+|.+\.transformer_blocks\.[1-9].+")
FOURTH_LEVEL = ("down_blocks.3.", "up_blocks.3.")


def is_sdxl(modules: Iterable[str]) -> bool:
    """Whether some of these names are found in SDXL's U-Net only. False if they do not tell."""
    names = list(modules)
    return any(map(ONLY_SDXL.fullmatch, names)) and not any(name.startswith(FOURTH_LEVEL) for name in names)


def sdxl_name(module: str) -> str:
    """Stability's name for a module of SDXL's U-Net, by diffusers' name. The same name if it has no other."""
    return sgm_name(module, depth=2, attends=True) or module  # both levels with an upsampler have attention


def sgm_name(module: str, depth: int, attends: bool) -> str | None:
    """Stability's name for a module of diffusers' UNet2DConditionModel. None if it has no other name.

    A level of ``depth`` layers is ``depth + 1`` blocks. On the way down these are its layers and the downsampler; on
    the way up its layers, the last of which includes the upsampler. A block lists residual layer, attention, sampler.

    Args:
        module: diffusers' name.
        depth: the model's ``layers_per_block``.
        attends: whether this module's level has attention.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    if not (match := BLOCK.fullmatch(module)):
        return None
    direction, level, block, number, rest = match.groups()
    if block == "resnets":
        rest = RESNET.get(rest, rest)
    elif block == "downsamplers":
        rest = "op"
    if direction is None:
        return f"middle_block.{2 * int(number) if block == 'resnets' else 1}.{rest}"
    first = int(level) * (depth + 1)
    if block == "downsamplers":
        return f"input_blocks.{first + depth + 1}.0.{rest}"
    if block == "upsamplers":
        return f"output_blocks.{first + depth}.{1 + attends}.{rest}"
    down = direction == "down"
    index = 0 if block == "resnets" else 1
    return f"{'input' if down else 'output'}_blocks.{first + int(number) + down}.{index}.{rest}"


def sgm_names(model: nn.Module) -> dict[str, str]:
    """Stability's names of a U-Net's modules, by diffusers' names. Empty for other models."""
    depth = getattr(getattr(model, "config", None), "layers_per_block", None)
    if not isinstance(depth, int):
        return {}
    modules = [name for name, _ in model.named_modules()]
    levels = {".".join(name.split(".")[:2]) for name in modules if ".attentions." in name}
    pairs = ((name, sgm_name(name, depth, ".".join(name.split(".")[:2]) in levels)) for name in modules)
    return {name: other for name, other in pairs if other}
