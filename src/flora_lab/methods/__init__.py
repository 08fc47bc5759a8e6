"""The ways to fine-tune a model that a comparison compares: one function each, a row in `METHODS`.

Every method adapts the same layers, those of them that it can; the rest is named in its notes. Its rank (the width of
an adapter) is the one whose trainable parameters, the head's aside, are nearest to the budget, counted on the meta
device; FLoRA, whose ranks are fine enough, stays within it. The head is trained by all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import flora as library
from flora.tuner.config import FloraConfig, check_rank
from flora_lab.methods.adalora import adalora
from flora_lab.methods.adapters import houlsby, pfeiffer
from flora_lab.methods.common import (
    AdaptedModel,
    CannotAdapt,
    Request,
    head_parameters,
    shortened,
    too_small,
    trainable,
    wrap,
)
from flora_lab.methods.with_lycoris import locon
from flora_lab.methods.with_peft import dora, loha, lokr, lora


@dataclass(frozen=True)
class Method:
    """``label``: for tables. ``size``: the option that fixes the adapter's size in place of a budget, None where it has
    none to choose."""

    build: Callable[..., AdaptedModel]
    label: str
    size: str | None = None


def adapt(
    method: str,
    model: nn.Module,
    head: Sequence[str],
    budget: int,
    options: dict[str, Any],
    *,
    target_modules: str | Sequence[str] = "all-weights",
    steps: int = 1000,
) -> AdaptedModel:
    """``model`` (changed in place) set up for training in one of the `METHODS`.

    Args:
        method: a key of `METHODS`.
        head: names of the modules that are trained whole.
        budget: trainable parameters of the adapter, the head's not counted; unused where options fix the size.
        options: fields of the method's own config; its ``size`` (`Method`) fixes the rank or the width.
        target_modules: what to adapt, as FloraConfig takes it; the option of that name overrides it.
        steps: optimizer steps of the whole training (AdaLoRA's schedule).

    Raises:
        CannotAdapt: the method can't run on this model, or not at this budget.
        ValueError, TypeError: an unknown method, head or option, or a value that is not accepted.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules:
            raise ValueError(f"head {name!r}: the model has no such module")
    size = METHODS[method].size
    if size in options:
        check_rank(size, options[size], many=method == "flora")
    elif size:
        check_rank("budget", budget, many=False)
    head_size = head_parameters(model, head)
    adapted = METHODS[method].build(Request(model, list(head), budget, target_modules, steps), **options)
    if adapted.parameters is None:
        adapted = replace(adapted, parameters=trainable(adapted.model) - head_size)
    return adapted


# ------------------------------------------------------------------------------------------------- without a budget


def full(request: Request) -> AdaptedModel:
    """Every weight is trained: what the adapters are measured against."""
    return AdaptedModel(request.model.requires_grad_(True))


def head_only(request: Request) -> AdaptedModel:
    """A linear probe: how far the frozen features go by themselves."""
    if not request.head:
        raise CannotAdapt("there is no head to train")
    request.train_head_only()
    return AdaptedModel(request.model)


def bitfit(request: Request) -> AdaptedModel:
    """Every bias (Zaken et al. 2021)."""
    request.train_head_only()
    before = trainable(request.model)
    for name, parameter in request.model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    if trainable(request.model) == before:
        raise CannotAdapt("the model has no bias but the head's")
    return AdaptedModel(request.model)


# ------------------------------------------------------------------------------------------------- FLoRA


def flora(request: Request, **options: Any) -> AdaptedModel:
    if "budget" in options:
        raise ValueError("budget: the job's own holds for every method; in its place r fixes the ranks")
    fields = {"target_modules": request.target_modules, **options}
    if "r" not in options:
        ones = FloraConfig(r=1, **{"kernel_rank": 1, **fields}, modules_to_save=request.head or None)
        if (least := library.plan(request.model, ones).total) > request.budget:
            too_small("FLoRA of rank", least, request.budget)
        fields["budget"] = request.budget
    config = FloraConfig(**fields, modules_to_save=request.head or None)
    plan = library.plan(request.model, config)
    model = wrap(request, request.model, config)
    start = partial(_from_gradient, model) if config.init == "gradient" else None
    return AdaptedModel(model, [f"ranks {_ranks(plan)}"], start=start)


@torch.no_grad()
def _from_gradient(model: nn.Module, batches: Iterable[dict]) -> None:
    """With the gradient that training sees first: in training mode, but running statistics stay as they are."""
    mode, before = model.training, [buffer.clone() for buffer in model.buffers()]
    library.initialize(model.train(), batches, loss=lambda model, batch: model(**batch)["loss"])
    model.train(mode)
    for buffer, kept in zip(model.buffers(), before, strict=True):
        buffer.copy_(kept)


def _ranks(plan: Any) -> str:
    """The different ranks, each with its number of weights."""
    counts = Counter("×".join(map(str, row.ranks)) for row in plan.rows)
    return shortened([f"{ranks} ({count})" for ranks, count in counts.most_common()])


METHODS: dict[str, Method] = {
    "full": Method(full, "full fine-tuning"),
    "head": Method(head_only, "head only"),
    "bitfit": Method(bitfit, "BitFit"),
    "houlsby": Method(houlsby, "Houlsby adapter", "width"),
    "pfeiffer": Method(pfeiffer, "Pfeiffer adapter", "width"),
    "lora": Method(lora, "LoRA", "r"),
    "dora": Method(dora, "DoRA", "r"),
    "adalora": Method(adalora, "AdaLoRA", "target_r"),
    "loha": Method(loha, "LoHa", "r"),
    "lokr": Method(lokr, "LoKr", "r"),
    "locon": Method(locon, "LoCon, Tucker", "lora_dim"),
    "flora": Method(flora, "FLoRA", "r"),
}
