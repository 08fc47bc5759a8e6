"""Methods of PEFT: LoRA with its options, LoHa, LoKr, HiRA, GraLoRA, MiSS, OFT. What they share serves every
other method that has a PeftConfig."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora_lab.methods.budget import largest_size, nearest_size, size_note, too_small
from flora_lab.methods.common import (
    AdaptedModel,
    CannotAdapt,
    Limits,
    Request,
    Selection,
    head_parameters,
    shortened,
    trainable,
    weight_shape,
)

_DORA = Limits(
    (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding), ("groups", "dilation", "padding_mode")
)
_LORA = Limits((*_DORA.layers, nn.MultiheadAttention), _DORA.ignored, parameters=True)
_HIRA = Limits(_DORA.layers, ("groups", "padding_mode"))
LINEAR = Limits((nn.Linear, Conv1D))
_TORCH_LINEAR = Limits((nn.Linear,))
_LYCORIS = Limits((nn.Linear, nn.Conv1d, nn.Conv2d), ("padding_mode",))  # LoHa and LoKr, which PEFT took from there
LOKR_FACTORS = (-1, 16, 8, 4, 2)  # -1: the factor nearest to the square root of the width


def lora(request: Request, **options: Any) -> AdaptedModel:
    """LoRA and PEFT's options of it: ``use_dora`` makes it DoRA, ``init_lora_weights`` PiSSA, OLoRA, …"""

    limits = _DORA if options.get("use_dora") else _LORA
    start = options.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        limits = LINEAR  # PEFT rejects the other starts for convolutions, and ignores them for embeddings
    most = _half_of_narrowest if start == "lora_ga" else Selection.full_rank
    step = 2 if start == "orthogonal" else 1  # PEFT gives half of the ranks to either factor
    return at_rank(request, peft.LoraConfig, limits, lora_fields, options, most=most, step=step)


def lora_fields(rank: int, selection: Selection) -> dict[str, Any]:
    """The fields of a LoraConfig at a rank."""
    return {"lora_alpha": 2 * rank, "fan_in_fan_out": selection.transposed}


def narrowest(selection: Selection) -> int:
    """The least width of the selected layers."""
    return min(min(weight_shape(layer)) for layer in selection.layers.values())


def _half_of_narrowest(selection: Selection) -> int:
    """The highest rank for PEFT's LoRA-GA, whose A and B take the gradient's singular vectors in turn."""
    return max(1, narrowest(selection) // 2)


def loha(request: Request, **options: Any) -> AdaptedModel:
    def fields(rank: int, selection: Selection) -> dict[str, Any]:
        return {"alpha": rank, "use_effective_conv2d": True}

    return at_rank(request, peft.LoHaConfig, _LYCORIS, fields, options, most=partial(Selection.full_rank, modes=(0, 1)))


def lokr(
    request: Request,
    target_modules: Any = None,
    r: int | None = None,
    decompose_factor: int | None = None,
    **options: Any,
) -> AdaptedModel:
    """LoKr. A Kronecker product has few parameters, so the factor is solved for too: of the largest ranks within the
    budget, one per factor, the one with the most parameters."""
    selection = request.select(_LYCORIS, target_modules)

    def config(factor: int, rank: int) -> peft.LoKrConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoKrConfig(r=rank, decompose_factor=factor, **fields, **peft_targets(request, selection))

    @cache
    def count(factor: int, rank: int) -> int:
        return adapter_parameters(request, config(factor, rank))

    if r:
        factor, rank = decompose_factor or LOKR_FACTORS[0], r
    else:
        factors = [decompose_factor] if decompose_factor else LOKR_FACTORS
        full = max(max(weight_shape(layer)[:2]) for layer in selection.layers.values())  # nothing grows beyond
        sizes = [(factor, largest_size(partial(count, factor), request.budget, full)) for factor in factors]
        sizes = [(factor, rank) for factor, rank in sizes if rank]
        if not sizes:
            too_small(min(count(factor, 1) for factor in factors), request.budget)
        factor, rank = max(sizes, key=lambda pair: count(*pair))
    notes = [f"rank {rank}, factor {factor} on {selection}", *selection.notes]
    return AdaptedModel(peft_model(request, config(factor, rank)), notes)


def hira(request: Request, **options: Any) -> AdaptedModel:
    """HiRA: the update is the weight times, entry by entry, a matrix of low rank (Huang et al. 2025)."""

    def fields(rank: int, selection: Selection) -> dict[str, Any]:
        return {"fan_in_fan_out": selection.transposed}

    return at_rank(request, peft.HiraConfig, _HIRA, fields, options)


def gralora(request: Request, gralora_k: int = 2, **options: Any) -> AdaptedModel:
    """GraLoRA: LoRA per block of a grid of ``gralora_k`` by ``gralora_k`` blocks (Jung et al. 2025)."""
    _refuse_convolutions(request, "GraLoRA")

    def fields(rank: int, selection: Selection) -> dict[str, Any]:
        weights = {name: weight_shape(layer) for name, layer in selection.layers.items()}
        if uneven := [name for name, shape in weights.items() if any(width % gralora_k for width in shape)]:
            raise CannotAdapt(f"GraLoRA needs widths that gralora_k={gralora_k} divides: {shortened(uneven)}")
        return {"gralora_k": gralora_k, "alpha": 2 * rank, "fan_in_fan_out": selection.transposed}

    return at_rank(request, peft.GraloraConfig, LINEAR, fields, options, step=gralora_k)


def miss(request: Request, **options: Any) -> AdaptedModel:
    """MiSS: blocks of the input's channels share one matrix (Kang and Yin 2024). PEFT accepts no rank above a layer's
    width, so that the narrowest layer limits all."""

    def most(selection: Selection) -> int:
        return min(weight_shape(layer)[1] for layer in selection.layers.values())

    return at_rank(request, peft.MissConfig, _TORCH_LINEAR, lambda rank, selection: {}, options, most=most)


def oft(request: Request, **options: Any) -> AdaptedModel:
    """OFT: orthogonal rotations of blocks of the input's channels (Qiu et al. 2023). PEFT rounds the size of the blocks
    to a divisor of each layer's width."""
    _refuse_convolutions(request, "OFT")

    def fields(size: int, selection: Selection) -> dict[str, Any]:
        return {"r": 0, "fan_in_fan_out": selection.transposed}

    def most(selection: Selection) -> int:
        return max(weight_shape(layer)[0 if isinstance(layer, Conv1D) else 1] for layer in selection.layers.values())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`", UserWarning)
        return at_rank(request, peft.OFTConfig, LINEAR, fields, options, size="oft_block_size", most=most, step=2)


def _refuse_convolutions(request: Request, name: str) -> None:
    """Raise CannotAdapt for a model with convolutions, whose linear layers may get inputs of four dimensions."""
    if any(isinstance(module, nn.Conv2d) for module in request.model.modules()):
        raise CannotAdapt(f"PEFT's {name} fails on linear layers that follow convolutions, as in ConvNeXt")


# ------------------------------------------------------------------------------------------------- any PeftConfig


def at_rank(
    request: Request,
    config_class: type[peft.PeftConfig],
    limits: Limits,
    fields: Callable[[int, Selection], dict[str, Any]],
    options: dict[str, Any],
    *,
    size: str = "r",
    most: Callable[[Selection], int] = Selection.full_rank,
    step: int = 1,
) -> AdaptedModel:
    """The model under ``config_class`` at the rank that the options fix, or else at the rank nearest to the budget.

    Args:
        fields: fields of the config at a rank, where they differ from the class's defaults; options override them.
        size: the config's field for the rank.
        most: the highest rank that makes sense for the selected weights.
        step: the rank must be a multiple of it.
    """
    options = dict(options)
    selection = request.select(limits, options.pop("target_modules", None), options.pop("target_parameters", None))
    fixed = options.pop(size, None)

    def config(rank: int) -> peft.PeftConfig:
        own = {size: rank, **fields(rank, selection), **options}
        return config_class(**own, **peft_targets(request, selection))

    def count(rank: int) -> int:
        return adapter_parameters(request, config(rank))

    full, name = most(selection), {"oft_block_size": "block size"}.get(size, "rank")
    rank = fixed or nearest_size(count, request.budget, full, name, step)
    notes = [f"{name} {size_note(rank, full)} on {selection}", *selection.notes]
    return AdaptedModel(peft_model(request, config(rank)), notes)


def peft_targets(request: Request, selection: Selection) -> dict[str, Any]:
    """Fields of a PeftConfig that name exactly the selected targets, and the head."""
    fields: dict[str, Any] = {"modules_to_save": request.head or None}
    if selection.layers:
        fields["target_modules"] = "|".join(map(re.escape, selection.layers))
    if selection.parameters:
        fields["target_parameters"] = list(selection.parameters)
    return fields


def adapter_parameters(request: Request, config: peft.PeftConfig) -> int:
    """Trainable parameters of the adapter, without the head's, counted on the meta device."""
    with torch.device("meta"):
        model = peft_model(request.on_meta(), config)
    return trainable(model) - head_parameters(request.model, request.head)


def peft_model(
    request: Request, config: peft.PeftConfig, model_class: type[peft.PeftModel] = peft.PeftModel
) -> peft.PeftModel:
    """The request's model with the adapter. Raises ValueError where PEFT would train more modules than the head."""
    heads = tuple(request.head)
    for name, _ in request.model.named_modules():
        if heads and name.endswith(heads) and name not in heads:
            raise ValueError(
                f"head {', '.join(heads)}: PEFT matches names by their ends and would train {name!r} too; "
                "add it to the head"
            )
    return model_class(request.model, config)
