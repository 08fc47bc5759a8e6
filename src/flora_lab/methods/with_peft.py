"""PEFT's own LoRA, DoRA, LoHa and LoKr, as their users run them."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora_lab.methods.common import (
    Adapted,
    Asked,
    Limits,
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


def lora(asked: Asked, target_modules: Any = None, r: int | None = None, **options: Any) -> Adapted:
    return _lora(asked, "LoRA", _LORA, target_modules, r, options)


def dora(asked: Asked, target_modules: Any = None, r: int | None = None, **options: Any) -> Adapted:
    return _lora(asked, "DoRA", _DORA, target_modules, r, {"use_dora": True, **options})


def _lora(asked: Asked, label: str, limits: Limits, target_modules: Any, r: int | None, options: dict) -> Adapted:
    layers, notes = asked.layers(limits, target_modules)
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())

    def config(rank: int) -> peft.LoraConfig:
        fields = {"lora_alpha": 2 * rank, "fan_in_fan_out": transposed, **options}
        return peft.LoraConfig(r=rank, **fields, **where(asked, layers))

    most = full_rank(layers.values())
    rank = r or fitting(lambda rank: count(asked, config(rank)), asked.budget, f"{label} of rank", most)
    return Adapted(wrap(asked, asked.model, config(rank)), [f"rank {said(rank, most)} on {len(layers)} layers", *notes])


def loha(asked: Asked, target_modules: Any = None, r: int | None = None, **options: Any) -> Adapted:
    layers, notes = asked.layers(_LOHA, target_modules)

    def config(rank: int) -> peft.LoHaConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoHaConfig(r=rank, **fields, **where(asked, layers))

    most = full_rank(layers.values(), modes=(0, 1))
    rank = r or fitting(lambda rank: count(asked, config(rank)), asked.budget, "LoHa of rank", most)
    return Adapted(wrap(asked, asked.model, config(rank)), [f"rank {said(rank, most)} on {len(layers)} layers", *notes])


def lokr(
    asked: Asked,
    target_modules: Any = None,
    r: int | None = None,
    decompose_factor: int | None = None,
    **options: Any,
) -> Adapted:
    """A Kronecker product holds few parameters, so its factor is chosen too."""
    layers, notes = asked.layers(_LOKR, target_modules)

    def config(factor: int, rank: int) -> peft.LoKrConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoKrConfig(r=rank, decompose_factor=factor, **fields, **where(asked, layers))

    @cache
    def parameters(factor: int, rank: int) -> int:
        return count(asked, config(factor, rank))

    if r:
        factor, rank = decompose_factor or LOKR_FACTORS[0], r
    else:
        factors = [decompose_factor] if decompose_factor else LOKR_FACTORS
        most = max(max(layer.weight.shape[:2]) for layer in layers.values())  # nothing grows beyond
        solved = [(factor, highest_rank(partial(parameters, factor), asked.budget, most)) for factor in factors]
        solved = [(factor, rank) for factor, rank in solved if rank]
        if not solved:
            too_small("LoKr of rank", min(parameters(factor, 1) for factor in factors), asked.budget)
        factor, rank = max(solved, key=lambda pair: parameters(*pair))
    notes = [f"rank {rank}, factor {factor} on {len(layers)} layers", *notes]
    return Adapted(wrap(asked, asked.model, config(factor, rank)), notes)
