"""What a method is given and gives back, which layers it can adapt, and how its size is found."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

import peft
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from flora.tuner.config import FloraConfig
from flora.tuner.targets import find_targets

SHOWN = 4
ABOVE = 1.25  # times the budget


@dataclass(frozen=True)
class AdaptedModel:
    """``model``: to train; its forward takes the base model's keywords. ``notes``: for the reader, the rank and what
    was left out, and why. ``callbacks``: what the method needs while it is trained. ``start``: to be called before with
    a few training batches on the model's device, if not None. ``parameters``: of the adapter, where counting what is
    trainable would mislead, else None.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    start: Callable[[Iterable[dict]], None] | None = None
    parameters: int | None = None


class CannotAdapt(ValueError):
    """The method can't run on this model, or not at this budget; the message says why."""


@dataclass(frozen=True)
class Limits:
    """What the package that has a method can adapt, train and merge: types of layers, and what of a convolution's own
    it does not carry over."""

    layers: tuple[type[nn.Module], ...]
    lost: tuple[str, ...]

    def reason(self, layer: nn.Module) -> str | None:
        """Why it can't adapt this one."""
        if not isinstance(layer, self.layers):
            return type(layer).__name__
        if isinstance(layer, nn.MultiheadAttention) and not layer._qkv_same_embed_dim:
            return "MultiheadAttention with widths of its own for key and value"
        if isinstance(layer, nn.modules.conv._ConvNd):
            plain = {"groups": 1, "dilation": (1,) * len(layer.kernel_size), "padding_mode": "zeros"}
            for name in self.lost:
                if getattr(layer, name) != plain[name]:
                    return f"{type(layer).__name__} with {name} other than {plain[name]}"
        return None


@dataclass(frozen=True)
class Request:
    """The arguments of `adapt`."""

    model: nn.Module
    head: list[str]
    budget: int
    target_modules: str | Sequence[str]
    steps: int

    def train_head_only(self) -> None:
        self.model.requires_grad_(False)
        for name in self.head:
            self.model.get_submodule(name).requires_grad_(True)

    def layers(self, limits: Limits, targets: str | Sequence[str] | None) -> tuple[dict[str, nn.Module], list[str]]:
        """The targeted layers that a method can adapt, by name, and notes on the others. Raises CannotAdapt."""
        config = FloraConfig(target_modules=targets or self.target_modules, modules_to_save=self.head)
        found = {target.module: target.layer for target in find_targets(self.model, config)}
        if not found:
            raise ValueError(f"target_modules={config.target_modules!r}: no layer of the model matches")
        reasons: dict[str, list[str]] = {}
        taken = {}
        for name, layer in found.items():
            if reason := limits.reason(layer):
                reasons.setdefault(reason, []).append(name)
            else:
                taken[name] = layer
        if not taken:
            raise CannotAdapt(f"it can adapt none of the {len(found)} layers: {', '.join(reasons)}")
        return taken, [f"left out, {reason}: {shortened(names)}" for reason, names in reasons.items()]


def shortened(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def head_parameters(model: nn.Module, head: Iterable[str]) -> int:
    return sum(p.numel() for name in head for p in model.get_submodule(name).parameters())


def copied(model: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda t: t) -> nn.Module:
    """The model's modules copied, its parameters and buffers each replaced by ``tensor`` of them: shared by default."""
    return copy.deepcopy(model, {id(t): tensor(t) for t in (*model.parameters(), *model.buffers())})


def on_meta(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def where(request: Request, layers: Iterable[str]) -> dict[str, Any]:
    """The fields of a PEFT config that name exactly these layers, and the head."""
    return {"target_modules": "|".join(map(re.escape, layers)), "modules_to_save": request.head or None}


def count(request: Request, config: peft.PeftConfig) -> int:
    """Trainable parameters of the adapter, the head's aside."""
    with torch.device("meta"):
        return trainable(wrap(request, copied(request.model, on_meta), config)) - head_parameters(
            request.model, request.head
        )


def wrap(
    request: Request, model: nn.Module, config: peft.PeftConfig, kind: type[peft.PeftModel] = peft.PeftModel
) -> peft.PeftModel:
    heads = tuple(request.head)
    for name, _ in request.model.named_modules():
        if heads and name.endswith(heads) and name not in heads:
            raise ValueError(
                f"head {', '.join(heads)}: PEFT would train {name!r} too, which ends alike; make it a part of the head"
            )
    return kind(model, config)


def full_rank(layers: Iterable[nn.Module], modes: Sequence[int] = (0,)) -> int:
    """The highest rank that one of the layers' weights can have, unfolded along any of the modes: none needs more."""
    weights = [layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight for layer in layers]
    return max(min(w.shape[mode], w.numel() // w.shape[mode]) for w in weights for mode in modes)


def fitting(count: Callable[[int], int], budget: int, what: str, most: int) -> int:
    """The rank, up to ``most``, whose ``count`` is nearest to the budget, the lower of two. Ranks are coarse: one that
    lies above is taken up to a quarter above. Raises CannotAdapt where the least lies higher."""
    count = cache(count)
    below = highest_rank(count, budget, most)
    above = count(below + 1) if below < most else math.inf
    if above > ABOVE * budget:
        return below or too_small(what, above, budget)
    return below + 1 if not below or above - budget < budget - count(below) else below


def too_small(what: str, least: int, budget: int) -> NoReturn:
    raise CannotAdapt(f"{what} 1 has {least:,} parameters, above the budget of {budget:,}")


def highest_rank(count: Callable[[int], int], budget: int, most: int) -> int:
    """The highest rank, up to ``most``, whose ``count``, which grows with it, is within the budget; else 0."""
    count = cache(count)
    if count(1) > budget:
        return 0
    if count(1) == count(most):  # a rank pattern fixes every rank
        return 1
    if count(most) <= budget:
        return most
    low, high = 1, most
    while high - low > 1:
        middle = min(2 * low, (low + high) // 2)  # ranks are low
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low


def said(size: int, most: int) -> str:
    """For a note: a rank or a width."""
    return f"{size} (full)" if size == most else f"{size}"
