"""What the benchmarks compare: one row of `VARIANTS` per variant, a method of `flora_lab.methods` and its options.

Ranks come from the registry, at the budget of LoRA's parameters. Two rows are no methods to fine-tune with, and have
their method here: the floor, and the layer of the paper taken literally.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from flora_lab.methods import METHODS, AdaptedModel, CannotAdapt, Method, Request, adapt
from flora_lab.methods.common import Limits, on_meta, share_weights

Targets = Mapping[str, Any]  # the arguments of `adapt` that say what to adapt
AUTHORS_SCALE = 0.4
NOISE = 0.02


def floor(request: Request) -> AdaptedModel:
    """The frozen model, with gradients flowing to its input."""
    return AdaptedModel(request.model.requires_grad_(False))


def authors(request: Request) -> AdaptedModel:
    """The authors' layer, written anew from the paper, at FLoRA's ranks."""
    selection = request.select(Limits((nn.Linear, nn.Conv2d), ("padding_mode",)))
    config = flora.FloraConfig(budget=request.budget, target_modules=request.target_modules)
    for weight in flora.plan(request.model, config).rows:
        layer = AuthorsLayer(request.model.get_submodule(weight.module), weight.ranks)
        request.model.set_submodule(weight.module, layer)
    return AdaptedModel(request.model, [f"FLoRA's ranks on {selection}"])


class AuthorsLayer(nn.Module):
    """Equations 5 to 7 of the paper taken literally: each step forms the whole delta and runs it as a second layer."""

    def __init__(self, base: nn.Linear | nn.Conv2d, ranks: tuple[int, ...]) -> None:
        super().__init__()
        shape, like = base.weight.shape, {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.core = nn.Parameter(torch.zeros(ranks, **like))
        factors = (torch.randn(size, rank, **like) * rank**-0.5 for size, rank in zip(shape, ranks, strict=True))
        self.factors = nn.ParameterList(factors)
        inner, outer = ascii_lowercase[: len(shape)], ascii_uppercase[: len(shape)]
        pairs = ",".join(large + small for large, small in zip(outer, inner, strict=True))
        self.equation = f"{inner},{pairs}->{outer}"

    def forward(self, input: Tensor) -> Tensor:
        delta = torch.einsum(self.equation, self.core, *self.factors) * AUTHORS_SCALE
        run = F.linear if isinstance(self.base, nn.Linear) else self.base._conv_forward
        return self.base(input) + run(input, delta, None)


def no_3x3_convolution(model: nn.Module) -> str | None:
    found = any(getattr(layer, "kernel_size", None) == (3, 3) for layer in model.modules())
    return None if found else "the model has no 3×3 convolution"


def no_depthwise_convolution(model: nn.Module) -> str | None:
    found = any(getattr(layer, "groups", 1) > 1 for layer in model.modules())
    return None if found else "the model has no depthwise convolution"


@dataclass(frozen=True)
class Variant:
    """A method and its options. ``reason``: why the variant would be no different from others on a model, else None."""

    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: Callable[[nn.Module], str | None] = lambda model: None


VARIANTS: dict[str, Variant] = {
    "floor": Variant(Method(floor, "frozen model")),
    **{name: Variant(METHODS[name]) for name in ("full", "lora", "dora", "loha", "lokr", "locon")},
    "locon-bypass": Variant(METHODS["locon"], {"bypass_mode": True}),
    "authors": Variant(Method(authors, "authors' layer")),
    "flora-auto": Variant(METHODS["flora"], {"execution": "auto"}),
    "flora-factored": Variant(METHODS["flora"], {"execution": "factored"}),
    "flora-merged": Variant(METHODS["flora"], {"execution": "merged"}),
    "flora-k3": Variant(METHODS["flora"], {"kernel_rank": 3}, no_3x3_convolution),
    "flora-all": Variant(METHODS["flora"], {"target_modules": "all-weights"}, no_depthwise_convolution),
}


def adapt_variant(name: str, model: nn.Module, targets: Targets, budget: int, seed: int) -> AdaptedModel:
    """A copy of ``model`` adapted by a variant, with shared weights unless the variant trains them.

    Raises CannotAdapt where the variant makes no sense for the model.
    """
    variant = VARIANTS[name]
    if reason := variant.reason(model):
        raise CannotAdapt(reason)
    torch.manual_seed(seed)
    own = copy.deepcopy(model) if name == "full" else share_weights(model)
    adapted = adapt(variant.method, own, [], budget, variant.options, **targets)
    disturb(adapted.model)
    return adapted


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Add small noise to all that is trained: adapters leave their start, where some tensors are all zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)


def lora_parameters(model: nn.Module, targets: Targets, rank: int) -> int:
    """The budget of every variant: the parameters of LoRA at this rank."""
    with torch.device("meta"):
        return adapt("lora", share_weights(model, on_meta), [], 1, {"r": rank}, **targets).parameters
