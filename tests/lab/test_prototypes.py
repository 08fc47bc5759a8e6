"""The prototypes of benchmarks/prototypes against dense updates in float64: outputs and all gradients."""

from __future__ import annotations

import copy
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from flora.tucker import reconstruct

FOLDER = Path(__file__).parents[2] / "benchmarks" / "prototypes"


@pytest.fixture(scope="module", autouse=True)
def prototypes():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def linear() -> list[nn.Module]:
    return [nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 5, bias=False)]


def conv2d(**options) -> list[nn.Module]:
    return [nn.Conv2d(6, 6, 3, **options) for _ in range(2)]


# name: (makes the base layers, ranks of each, shape of the input)
LINEAR_CASES = {
    "square cores": (linear, [(3, 3)] * 3, (2, 6, 7)),
    "wide and tall cores": (linear, [(3, 4), (4, 3), (3, 4)], (2, 6, 7)),
}
CONV2D_CASES = {
    "conv2d": (partial(conv2d, padding=1), [(4, 3, 2, 2)] * 2, (2, 6, 7, 8)),
    "stride and dilation": (partial(conv2d, padding=2, stride=2, dilation=2), [(3, 4, 3, 2)] * 2, (2, 6, 17, 18)),
    "depthwise": (partial(conv2d, padding=1, groups=6), [(4, 1, 2, 3)] * 2, (2, 6, 7, 8)),
    "circular": (partial(conv2d, padding=1, padding_mode="circular"), [(4, 3, 2, 2)] * 2, (2, 6, 7, 8)),
}
CASES = {
    **LINEAR_CASES,
    **CONV2D_CASES,
    "conv1d": (lambda: [nn.Conv1d(6, 6, 3, padding=1)], [(4, 3, 2)], (2, 6, 9)),
    "conv3d": (lambda: [nn.Conv3d(4, 4, 3, padding=1)], [(3, 2, 2, 1, 3)], (1, 4, 4, 5, 3)),
    "two kinds": (lambda: [nn.Conv2d(4, 4, 1), nn.Linear(5, 5)], [(2, 3, 1, 1), (3, 2)], (2, 4, 3, 5)),
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def core_spaces(bases: list[nn.Module], ranks: list[tuple[int, ...]]) -> list[tuple[Tensor, list[Tensor], float]]:
    spaces = []
    for n, (base, own) in enumerate(zip(bases, ranks, strict=True)):
        factors = [torch.randn(size, rank) * size**-0.5 for size, rank in zip(base.weight.shape, own, strict=True)]
        spaces.append((torch.randn(own), factors, 0.3 + 0.1 * n))
    return spaces


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.cos(torch.arange(output.numel())).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


def dense(bases, spaces, input):
    """Outputs and gradients with W + ΔW formed by plain operations."""
    input, parameters = input.clone().requires_grad_(), []
    output = input
    for base, (core, factors, scale) in zip(bases, spaces, strict=True):
        core, *factors = own = [tensor.clone().requires_grad_() for tensor in (core, *factors)]
        parameters += own
        weight = base.weight + scale * reconstruct(core, factors)
        output = torch.tanh(functional_call(base, {"weight": weight}, output))
    return gradients(output, [input, *parameters])


def together(layer, bases, spaces, input, multiple=1, low=None):
    """The same by `AllLayers`."""
    module, layers = import_module("all_layers"), []
    if low is not None:  # autocast leaves float64 alone
        bases = [copy.deepcopy(base).float() for base in bases]
        spaces = [(core.float(), [factor.float() for factor in factors], scale) for core, factors, scale in spaces]
        input = input.float()
    for base, (core, factors, scale) in zip(bases, spaces, strict=True):
        layers.append(getattr(module, layer)(base, core.clone(), [factor.clone() for factor in factors], scale))
    model = nn.Sequential(*(part for own in layers for part in (own, nn.Tanh())))
    model.register_forward_pre_hook(module.AllLayers(layers, multiple))
    input = input.clone().requires_grad_()
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        output = model(input)
    return gradients(output, [input, *(p for own in layers for p in (own.core, *own.factors))])


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def case(request, double):
    make, ranks, shape = CASES[request.param]
    bases = [base.requires_grad_(False) for base in make()]
    return bases, core_spaces(bases, ranks), torch.randn(shape)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("case", LINEAR_CASES, indirect=True)
def test_factored_is_exact(case, multiple):
    torch.testing.assert_close(together("FactoredLinear", *case, multiple), dense(*case), **EXACT)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_merged_is_exact(case):
    torch.testing.assert_close(together("MergedLayer", *case), dense(*case), **EXACT)


@pytest.mark.parametrize("case", CONV2D_CASES, indirect=True)
def test_merged_is_exact_with_channels_last(case):
    bases, spaces, input = case
    bases = [base.to(memory_format=torch.channels_last) for base in bases]
    input = input.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(together("MergedLayer", bases, spaces, input), dense(bases, spaces, input), **EXACT)


@pytest.mark.parametrize("layer", ["FactoredLinear", "MergedLayer"])
@pytest.mark.parametrize("case", LINEAR_CASES, indirect=True)
def test_autocast_loses_only_what_bf16_rounds(case, layer):
    for result, exact in zip(together(layer, *case, low=torch.bfloat16), dense(*case), strict=True):
        assert (result - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("ranks", [(2, 3, 4), (3, 4, 3)])
def test_experts_are_exact(ranks):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5, 6), requires_grad=False)

        def forward(self, input: Tensor) -> Tensor:
            return torch.stack([torch.tanh(input @ self.weight[torch.tensor(e)].mT) for e in (0, 2, 3)])

    base, input = Experts(), torch.randn(7, 6, requires_grad=True)
    [(core, factors, scale)] = core_spaces([base], [ranks])
    own = [tensor.clone().requires_grad_() for tensor in (core, *factors)]
    weight = base.weight + scale * reconstruct(own[0], own[1:])
    want = gradients(functional_call(base, {"weight": weight}, input), [input, *own])
    experts = import_module("experts").MergedExperts(base, {"weight": (core, factors, scale)})
    got = gradients(experts(input), [input, experts.cores["weight"], *experts.factors["weight"]])
    torch.testing.assert_close(got, want, **EXACT)
    assert list(vars(base)) == list(vars(Experts()))


def test_the_rule_is_that_of_the_readme():
    merges = import_module("rule").merges
    assert merges(768, 768, 330, launch=0) and not merges(768, 768, 310, launch=0)
    assert merges(768, 3072, 1700, launch=0) and not merges(768, 3072, 1600, launch=0)
    assert all(merges(768, width, positions) for width in (768, 3072) for positions in (1, 100_000))
    assert not any(merges(4096, 4096, positions) for positions in (1, 512, 100_000))
