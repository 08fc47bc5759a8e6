"""LoCon of LyCORIS."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from flora_lab.methods.budget import nearest_size, size_note
from flora_lab.methods.common import AdaptedModel, CannotAdapt, Limits, Request, is_quantized, trainable

LIMITS = Limits((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), ("padding_mode",))


def locon(request: Request, target_modules: Any = None, lora_dim: int | None = None, **options: Any) -> AdaptedModel:
    """LoCon with a Tucker core in every convolution: FLoRA at full kernel ranks. ``options`` are LoConModule's."""
    try:
        from lycoris import LoConModule
    except ImportError:
        raise CannotAdapt("lycoris-lora is not installed") from None
    known = set(inspect.signature(LoConModule).parameters)
    for name in options:
        if name not in known:  # LoConModule ignores such an argument
            raise TypeError(f"LoConModule got an unexpected keyword argument {name!r}")
    selection = request.select(LIMITS, target_modules)

    # beside a quantized layer, since LyCORIS would add to its packed numbers
    beside = {name: is_quantized(layer) for name, layer in selection.layers.items()}

    def build(rank: int) -> dict[str, nn.Module]:
        fields = {"lora_dim": rank, "alpha": rank, "use_tucker": True}
        return {
            name: LoConModule(name.replace(".", "_"), layer, **{**fields, "bypass_mode": beside[name], **options})
            for name, layer in selection.layers.items()
        }

    def count(rank: int) -> int:
        with torch.device("meta"):
            return sum(map(trainable, build(rank).values()))

    full = selection.full_rank(modes=(0, 1))
    rank = lora_dim or nearest_size(count, request.budget, full)
    request.train_head_only()
    for name, adapter in build(rank).items():
        layer = selection.layers[name]
        layer.add_module("locon", adapter.to(layer.weight.device))
        adapter.apply_to()
    return AdaptedModel(request.model, [f"rank {size_note(rank, full)} on {selection}", *selection.notes])
