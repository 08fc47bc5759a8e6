"""Literal references in float64: an einsum with every index written out, and the base layer with another weight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flora import CoreSpace, FloraLayer

LETTERS = "abcdef"


def delta(space: CoreSpace) -> Tensor:
    """s · Σ G[j1 … jN] A1[i1, j1] … AN[iN, jN], as one einsum (paper equation 5)."""
    n = len(space.factors)
    core, full = LETTERS[:n].upper(), LETTERS[:n]
    equation = ",".join([core, *(i + j for i, j in zip(full, core, strict=True))]) + "->" + full
    return space.scale * torch.einsum(equation, space.core, *space.factors)


def layers(model: nn.Module) -> list[FloraLayer]:
    return [module for module in model.modules() if isinstance(module, FloraLayer)]


def name_in_base(layer: FloraLayer) -> str:
    """The weight's name in the base layer of a case."""
    return f"{layer.site.module}.{layer.parameter_name}".removeprefix("layer.")


def run(base: nn.Module, weights: dict[str, Tensor], args: tuple):
    """A copy of the base layer whose named weights are plain tensors, so that gradients reach what made them."""
    layer = copy.deepcopy(base)
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(path)
        del owner._parameters[leaf]
        object.__setattr__(owner, leaf, weight)
        owner.sparse = False  # an embedding's: what made the weight needs a dense gradient
    return first(layer(*args))


def forward(model: nn.Module, base: nn.Module, args: tuple, adapters: dict[str, float]):
    """The base layer with W + Σ weight · delta."""
    weights = {}
    for layer in layers(model):
        name = name_in_base(layer)
        weight = dict(base.named_parameters())[name].detach()
        for adapter, factor in adapters.items():
            weight = weight + factor * delta(layer.tucker_space[adapter])
        weights[name] = weight
    return run(base, weights, args)


def first(output):
    """An attention's output without its weights."""
    return output[0] if isinstance(output, tuple) else output


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many steps of their dtype lie between two tensors' numbers: 0 for equal, 1 for neighbours."""

    def place(x: Tensor) -> Tensor:
        """Each number's place among all of its dtype, from the least: its bits, which are a sign and a magnitude."""
        bits = x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])
        return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits).long()

    assert a.dtype == b.dtype
    return (place(a) - place(b)).abs()
