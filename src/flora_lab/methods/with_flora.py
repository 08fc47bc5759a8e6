"""FLoRA, from `flora`, with ranks solved for the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

import flora as library
from flora import FloraConfig, FloraLayer
from flora.layers.starts import STARTS
from flora_lab.methods.budget import too_small
from flora_lab.methods.common import AdaptedModel, Request, shortened
from flora_lab.methods.with_peft import peft_model


def flora(request: Request, **options: Any) -> AdaptedModel:
    """``options`` are fields of FloraConfig; ``r`` replaces the budget."""
    if "budget" in options:
        raise ValueError("budget: every method of a job has the job's own; set r to fix FLoRA's ranks")
    fields = {
        "target_modules": request.target_modules,
        "target_parameters": request.target_parameters,
        "modules_to_save": request.head or None,
        **options,
    }
    if "r" not in options:
        fields["budget"] = request.budget
    config = FloraConfig(**fields)
    try:
        model = peft_model(request, config)
    except ValueError:
        if config.budget:
            _check_budget(request, fields)
        raise
    start = partial(_start_from_data, model) if STARTS[config.init].from_data else None
    return AdaptedModel(model, [f"ranks {_ranks(model)}"], start=start)


def _check_budget(request: Request, fields: dict[str, Any]) -> None:
    """Raise CannotAdapt if FLoRA at rank 1 exceeds the budget."""
    ones = FloraConfig(**{"kernel_rank": 1, **fields, "budget": None, "r": 1})
    least = library.plan(request.model, ones).total
    if least > request.budget:
        too_small(least, request.budget)


def _ranks(model: nn.Module) -> str:
    """Each combination of ranks, the most frequent first, with its number of weights: "4×4×2×2 (3), 6×5×2×2 (1)"."""
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    shapes = [space.core.shape for layer in layers for space in layer.tucker_space.values()]
    counts = Counter("×".join(map(str, shape)) for shape in shapes)
    return shortened([f"{ranks} ({count})" for ranks, count in counts.most_common()])


def _start_from_data(model: nn.Module, batches: Iterable[dict]) -> None:
    library.initialize(model, batches, loss=lambda model, batch: model(**batch)["loss"])
