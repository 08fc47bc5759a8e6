"""PEFT's own LoRA, DoRA, LoHa and LoKr, as their users run them."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora_lab.methods.common import (
    AdaptedModel,
    Limits,
    Request,
    count,
    fitting,
    full_rank,
    highest_rank,
    said,
    too_small,
    where,
    wrap,
)

_DORA = Limits(
    (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding), ("groups", "dilation", "padding_mode")
)
_LORA = Limits((*_DORA.layers, nn.MultiheadAttention), _DORA.lost)
_LOHA = _LOKR = Limits((nn.Linear, nn.Conv1d, nn.Conv2d), ("padding_mode",))
LOKR_FACTORS = (-1, 16, 8, 4, 2)  # -1: as near to a square as can be


def lora(request: Request, target_modules: Any = None, r: int | None = None, **options: Any) -> AdaptedModel:
    return _lora(request, "LoRA", _LORA, target_modules, r, options)


def dora(request: Request, target_modules: Any = None, r: int | None = None, **options: Any) -> AdaptedModel:
    return _lora(request, "DoRA", _DORA, target_modules, r, {"use_dora": True, **options})


def _lora(
    request: Request, label: str, limits: Limits, target_modules: Any, r: int | None, options: dict
) -> AdaptedModel:
    layers, notes = request.layers(limits, target_modules)
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())

    def config(rank: int) -> peft.LoraConfig:
        fields = {"lora_alpha": 2 * rank, "fan_in_fan_out": transposed, **options}
        return peft.LoraConfig(r=rank, **fields, **where(request, layers))

    most = full_rank(layers.values())
    rank = r or fitting(lambda rank: count(request, config(rank)), request.budget, f"{label} of rank", most)
    return AdaptedModel(
        wrap(request, request.model, config(rank)), [f"rank {said(rank, most)} on {len(layers)} layers", *notes]
    )


def loha(request: Request, target_modules: Any = None, r: int | None = None, **options: Any) -> AdaptedModel:
    layers, notes = request.layers(_LOHA, target_modules)

    def config(rank: int) -> peft.LoHaConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoHaConfig(r=rank, **fields, **where(request, layers))

    most = full_rank(layers.values(), modes=(0, 1))
    rank = r or fitting(lambda rank: count(request, config(rank)), request.budget, "LoHa of rank", most)
    return AdaptedModel(
        wrap(request, request.model, config(rank)), [f"rank {said(rank, most)} on {len(layers)} layers", *notes]
    )


def lokr(
    request: Request,
    target_modules: Any = None,
    r: int | None = None,
    decompose_factor: int | None = None,
    **options: Any,
) -> AdaptedModel:
    """A Kronecker product holds few parameters, so its factor is chosen too."""
    layers, notes = request.layers(_LOKR, target_modules)

    def config(factor: int, rank: int) -> peft.LoKrConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoKrConfig(r=rank, decompose_factor=factor, **fields, **where(request, layers))

    @cache
    def parameters(factor: int, rank: int) -> int:
        return count(request, config(factor, rank))

    if r:
        factor, rank = decompose_factor or LOKR_FACTORS[0], r
    else:
        factors = [decompose_factor] if decompose_factor else LOKR_FACTORS
        most = max(max(layer.weight.shape[:2]) for layer in layers.values())  # nothing grows beyond
        solved = [(factor, highest_rank(partial(parameters, factor), request.budget, most)) for factor in factors]
        solved = [(factor, rank) for factor, rank in solved if rank]
        if not solved:
            too_small("LoKr of rank", min(parameters(factor, 1) for factor in factors), request.budget)
        factor, rank = max(solved, key=lambda pair: parameters(*pair))
    notes = [f"rank {rank}, factor {factor} on {len(layers)} layers", *notes]
    return AdaptedModel(wrap(request, request.model, config(factor, rank)), notes)
