"""The names of a U-Net's layers in Stability's own code, which files for SDXL have in place of diffusers'."""

from __future__ import annotations

import re

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


def sgm_name(module: str, depth: int, attends: bool) -> str | None:
    """The name of a module of diffusers' UNet2DConditionModel; None for what has no other.

    A level of ``depth`` layers is depth + 1 blocks in a row: on the way down its layers, then the downsampler; on the
    way up its layers, in the last of them the upsampler, too. A block is a list: residual layer, attention, sampler.

    Args:
        depth: the model's ``layers_per_block``.
        attends: whether this module's level has attention.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    if not (match := BLOCK.fullmatch(module)):
        return None
    way, level, part, number, rest = match.groups()
    if part == "resnets":
        rest = RESNET.get(rest, rest)
    elif part == "downsamplers":
        rest = "op"
    if way is None:
        return f"middle_block.{2 * int(number) if part == 'resnets' else 1}.{rest}"
    first = int(level) * (depth + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + depth + 1}.0.{rest}"
    if part == "upsamplers":
        return f"output_blocks.{first + depth}.{1 + attends}.{rest}"
    place = "0" if part == "resnets" else "1"
    return f"{'input' if way == 'down' else 'output'}_blocks.{first + int(number) + (way == 'down')}.{place}.{rest}"


def sgm_names(model: nn.Module) -> dict[str, str]:
    """The other name of every module of a U-Net that has one; none for other models."""
    depth = getattr(getattr(model, "config", None), "layers_per_block", None)
    if not isinstance(depth, int):
        return {}
    modules = [name for name, _ in model.named_modules()]
    levels = {".".join(name.split(".")[:2]) for name in modules if ".attentions." in name}
    pairs = ((name, sgm_name(name, depth, ".".join(name.split(".")[:2]) in levels)) for name in modules)
    return {name: other for name, other in pairs if other}
