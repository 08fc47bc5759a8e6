"""The ways to fine-tune a model that a comparison compares: one function each, a row in `METHODS`.

Every method adapts the same layers, those of them that it can; the rest is named in its notes. Its rank (the width of
an adapter) is the one whose trainable parameters, the head's aside, are nearest to the budget, counted on the meta
device; FLoRA, whose ranks are fine enough, stays within it. The head is trained by all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import flora as library
from flora.tuner.config import FloraConfig, check_rank
from flora_lab.methods.adalora import adalora
from flora_lab.methods.adapters import houlsby, pfeiffer
from flora_lab.methods.common import Adapted, Asked, LeftOut, shortened, too_small, trainable, wrap
from flora_lab.methods.with_lycoris import locon
from flora_lab.methods.with_peft import dora, loha, lokr, lora


@dataclass(frozen=True)
class Way:
    """``label``: for tables. ``size``: the option that fixes the adapter's size in place of a budget, None where it has
    none to choose."""

    function: Callable[..., Adapted]
    label: str
    size: str | None = None

    @property
    def sized(self) -> bool:
        return self.size is not None


def adapt(
    way: str,
    model: nn.Module,
    head: Sequence[str],
    budget: int,
    options: dict[str, Any],
    *,
    targets: str | Sequence[str] = "all-weights",
    steps: int = 1000,
) -> Adapted:
    """``model`` (changed in place) set up for training in one of the `METHODS`.

    Args:
        way: a key of `METHODS`.
        head: names of the modules that are trained whole.
        budget: trainable parameters of the adapter, the head's not counted; unused where options fix the size.
        options: fields of the method's own config; its ``size`` (`Way`) fixes the rank or the width.
        targets: what is adapted, as FloraConfig's ``target_modules`` takes it.
        steps: optimizer steps of the whole training (AdaLoRA's schedule).

    Raises:
        LeftOut: the method can't run on this model, or not at this budget.
        ValueError, TypeError: an unknown way, head or option, or a value that is not accepted.
    """
    if way not in METHODS:
        raise ValueError(f"method {way!r}: expected one of {', '.join(METHODS)}")
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules:
            raise ValueError(f"head {name!r}: the model has no such module")
    size = METHODS[way].size
    if size in options:
        check_rank(size, options[size], many=way == "flora")
    elif size:
        check_rank("budget", budget, many=False)
    return METHODS[way].function(Asked(model, list(head), budget, targets, steps), **options)


# ------------------------------------------------------------------------------------------------- without a budget


def full(asked: Asked) -> Adapted:
    """Every weight is trained: what the adapters are measured against."""
    return Adapted(asked.model.requires_grad_(True))


def head_only(asked: Asked) -> Adapted:
    """A linear probe: how far the frozen features go by themselves."""
    if not asked.head:
        raise LeftOut("there is no head to train")
    asked.train_head_only()
    return Adapted(asked.model)


def bitfit(asked: Asked) -> Adapted:
    """Every bias (Zaken et al. 2021)."""
    asked.train_head_only()
    before = trainable(asked.model)
    for name, parameter in asked.model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    if trainable(asked.model) == before:
        raise LeftOut("the model has no bias but the head's")
    return Adapted(asked.model)


# ------------------------------------------------------------------------------------------------- FLoRA


def flora(asked: Asked, **options: Any) -> Adapted:
    if "budget" in options:
        raise ValueError("budget: the job's own holds for every method; in its place r fixes the ranks")
    fields = {"target_modules": asked.targets, **options}
    if "r" not in options:
        ones = FloraConfig(r=1, **{"kernel_rank": 1, **fields}, modules_to_save=asked.head or None)
        if (least := library.plan(asked.model, ones).total) > asked.budget:
            too_small("FLoRA of rank", least, asked.budget)
        fields["budget"] = asked.budget
    config = FloraConfig(**fields, modules_to_save=asked.head or None)
    plan = library.plan(asked.model, config)
    model = wrap(asked, asked.model, config)
    start = partial(_from_gradient, model) if config.init == "gradient" else None
    return Adapted(model, [f"ranks {_ranks(plan)}"], start=start)


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


METHODS: dict[str, Way] = {
    "full": Way(full, "full fine-tuning"),
    "head": Way(head_only, "head only"),
    "bitfit": Way(bitfit, "BitFit"),
    "houlsby": Way(houlsby, "Houlsby adapter", "width"),
    "pfeiffer": Way(pfeiffer, "Pfeiffer adapter", "width"),
    "lora": Way(lora, "LoRA", "r"),
    "dora": Way(dora, "DoRA", "r"),
    "adalora": Way(adalora, "AdaLoRA", "target_r"),
    "loha": Way(loha, "LoHa", "r"),
    "lokr": Way(lokr, "LoKr", "r"),
    "locon": Way(locon, "LoCon, Tucker", "lora_dim"),
    "flora": Way(flora, "FLoRA", "r"),
}
