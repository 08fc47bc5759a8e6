"""LyCORIS' LoCon, as its users run it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from flora_lab.methods.common import AdaptedModel, CannotAdapt, Limits, Request, fitting, full_rank, said, trainable

LIMITS = Limits((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), ("padding_mode",))


def locon(request: Request, target_modules: Any = None, lora_dim: int | None = None, **options: Any) -> AdaptedModel:
    """LyCORIS' LoCon, a Tucker core in every convolution: FLoRA at full kernel ranks."""
    try:
        from lycoris import LoConModule
    except ImportError:
        raise CannotAdapt("lycoris-lora is not installed") from None
    known = set(inspect.signature(LoConModule).parameters)
    for name in options:
        if name not in known:  # it takes them in silence
            raise TypeError(f"LoConModule got an unexpected keyword argument {name!r}")
    layers, notes = request.layers(LIMITS, target_modules)

    def build(rank: int) -> dict[str, nn.Module]:
        fields = {"alpha": rank, "use_tucker": True, "bypass_mode": False, **options}
        return {
            name: LoConModule(name.replace(".", "_"), layer, lora_dim=rank, **fields) for name, layer in layers.items()
        }

    def count(rank: int) -> int:
        with torch.device("meta"):
            return sum(map(trainable, build(rank).values()))

    most = full_rank(layers.values(), modes=(0, 1))
    rank = lora_dim or fitting(count, request.budget, "LoCon of rank", most)
    request.train_head_only()
    for name, adapter in build(rank).items():
        layers[name].add_module("locon", adapter.to(layers[name].weight.device))
        adapter.apply_to()
    return AdaptedModel(request.model, [f"rank {said(rank, most)} on {len(layers)} layers", *notes])
