"""Methods of PEFT: LoRA and DoRA, LoHa, LoKr. What they share serves every other method that has a PeftConfig."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora_lab.methods.budget import largest_size, nearest_size, size_note, too_small
from flora_lab.methods.common import AdaptedModel, Limits, Request, Selection, head_parameters, trainable

_DORA = Limits(
    (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding), ("groups", "dilation", "padding_mode")
)
_LORA = Limits((*_DORA.layers, nn.MultiheadAttention), _DORA.ignored, parameters=True)
_LINEAR = Limits((nn.Linear, Conv1D))
_LYCORIS = Limits((nn.Linear, nn.Conv1d, nn.Conv2d), ("padding_mode",))  # LoHa and LoKr, which PEFT took from there
LOKR_FACTORS = (-1, 16, 8, 4, 2)  # -1: the factor nearest to the square root of the width


def lora(request: Request, **options: Any) -> AdaptedModel:
    """LoRA and PEFT's options of it: ``use_dora`` makes it DoRA, ``init_lora_weights`` PiSSA, OLoRA, …"""

    def fields(rank: int, selection: Selection) -> dict[str, Any]:
        return {"lora_alpha": 2 * rank, "fan_in_fan_out": selection.transposed}

    limits = _DORA if options.get("use_dora") else _LORA
    if options.get("init_lora_weights", True) not in (True, False, "gaussian"):
        limits = _LINEAR  # PEFT rejects the other starts for convolutions, and ignores them for embeddings
    return at_rank(request, peft.LoraConfig, limits, fields, options)


def loha(request: Request, **options: Any) -> AdaptedModel:
    def fields(rank: int, selection: Selection) -> dict[str, Any]:
        return {"alpha": rank, "use_effective_conv2d": True}

    return at_rank(request, peft.LoHaConfig, _LYCORIS, fields, options, modes=(0, 1))


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
        full = max(max(layer.weight.shape[:2]) for layer in selection.layers.values())  # nothing grows beyond
        sizes = [(factor, largest_size(partial(count, factor), request.budget, full)) for factor in factors]
        sizes = [(factor, rank) for factor, rank in sizes if rank]
        if not sizes:
            too_small(min(count(factor, 1) for factor in factors), request.budget)
        factor, rank = max(sizes, key=lambda pair: count(*pair))
    notes = [f"rank {rank}, factor {factor} on {selection}", *selection.notes]
    return AdaptedModel(peft_model(request, config(factor, rank)), notes)


# ------------------------------------------------------------------------------------------------- any PeftConfig


def at_rank(
    request: Request,
    config_class: type[peft.PeftConfig],
    limits: Limits,
    fields: Callable[[int, Selection], dict[str, Any]],
    options: dict[str, Any],
    *,
    size: str = "r",
    modes: tuple[int, ...] = (0,),
) -> AdaptedModel:
    """The model under ``config_class`` at the rank that the options fix, or else at the rank nearest to the budget.

    Args:
        fields: fields of the config at a rank, where they differ from the class's defaults; options override them.
        size: the config's field for the rank.
        modes: the weight's modes along which the method's rank is defined (`Selection.full_rank`).
    """
    options = dict(options)
    selection = request.select(limits, options.pop("target_modules", None), options.pop("target_parameters", None))
    fixed = options.pop(size, None)

    def config(rank: int) -> peft.PeftConfig:
        own = {size: rank, **fields(rank, selection), **options}
        return config_class(**own, **peft_targets(request, selection))

    full = selection.full_rank(modes)
    rank = fixed or nearest_size(lambda rank: adapter_parameters(request, config(rank)), request.budget, full)
    notes = [f"rank {size_note(rank, full)} on {selection}", *selection.notes]
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
