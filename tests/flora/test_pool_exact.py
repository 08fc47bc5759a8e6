"""The weight-side work of many layers by itself: outputs and all gradients against dense updates in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from flora.layers.execution.cost import CHANNELS, WIDTH, Weight, padded, pooled
from flora.layers.execution.pool import Entry, form
from flora.layers.execution.stand_in import StandIn
from flora.tucker import reconstruct


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


def together(name, bases, spaces, input, low=None):
    """The same by ``pool.form``; with ``low``, float32 adapters of layers that compute in that type."""
    wide = torch.float64 if low is None else torch.float32
    low = low or wide
    leaf, entries = input.to(wide).requires_grad_(), []
    for base, (core, factors, scale) in zip(bases, spaces, strict=True):
        own = tuple(tensor.to(wide, copy=True).requires_grad_() for tensor in (core, *factors))
        entries.append(Entry(name, base.weight.detach().to(wide), own, torch.tensor(scale), low))
    output = leaf.to(low)
    for base, formed in zip(bases, form(entries), strict=True):
        bias = None if base.bias is None else base.bias.detach().to(low)
        if name == "factored":
            down, up = formed
            output = torch.nn.functional.linear(output, base.weight.detach().to(low), bias) + output @ down @ up
        else:
            output = functional_call(base, {"weight": formed[0]} | ({} if bias is None else {"bias": bias}), output)
        output = torch.tanh(output)
    return gradients(output, [leaf, *(tensor for entry in entries for tensor in entry.parameters)])


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
def test_factored_is_exact(case, multiple, monkeypatch):
    monkeypatch.setattr("flora.layers.execution.formed.padded", lambda rank, dtype, device: rank + -rank % multiple)
    torch.testing.assert_close(together("factored", *case), dense(*case), **EXACT)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_merged_is_exact(case):
    torch.testing.assert_close(together("merged", *case), dense(*case), **EXACT)


@pytest.mark.parametrize("ranks", [(4, 3, 2), (4, 3, 2, 3), (3, 2, 2, 1, 3)], ids=str)
def test_kernels_are_exact(ranks):
    def kernels(make):
        own = [[tensor.clone().requires_grad_() for tensor in (core, *factors)] for core, factors, _ in spaces]
        results = [torch.sin(kernel) for kernel in make(own)]
        return gradients(torch.stack(results), [tensor for parameters in own for tensor in parameters])

    def together(own):
        weight, scales = torch.empty(0), [torch.tensor(scale) for _, _, scale in spaces]
        entries = [Entry("kernel", weight, tuple(p), s, torch.bfloat16) for p, s in zip(own, scales, strict=True)]
        return [kernel for (kernel,) in form(entries)]

    def dense(own):
        whole = [torch.eye(rank) for rank in ranks[:2]]
        return [scale * reconstruct(core, [*whole, *f]) for (core, *f), (_, _, scale) in zip(own, spaces, strict=True)]

    spaces = [(torch.randn(ranks), [torch.randn(3, rank) for rank in ranks[2:]], 0.3 + 0.1 * n) for n in range(3)]
    torch.testing.assert_close(kernels(together), kernels(dense), **EXACT)


@pytest.mark.parametrize("case", CONV2D_CASES, indirect=True)
def test_merged_is_exact_with_channels_last(case):
    bases, spaces, input = case
    bases = [base.to(memory_format=torch.channels_last) for base in bases]
    input = input.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(together("merged", bases, spaces, input), dense(bases, spaces, input), **EXACT)


@pytest.mark.parametrize("name", ["factored", "merged"])
@pytest.mark.parametrize("case", LINEAR_CASES, indirect=True)
def test_a_low_type_loses_only_what_bf16_rounds(case, name):
    for result, exact in zip(together(name, *case, low=torch.bfloat16), dense(*case), strict=True):
        assert (result - exact).norm() < 0.06 * exact.norm()


class Casts(TorchDispatchMode):
    """Counts the casts."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [(3, 4), (4, 3)])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["factored", "merged", "delta"])
def test_gradients_are_cast_for_all_layers_at_once(name, adapter, ranks):
    def casts(count):
        entries = [
            Entry(name, torch.randn(7, 7, dtype=adapter), own, torch.ones((), dtype=torch.float32), torch.bfloat16)
            for own in (
                tuple(
                    torch.randn(shape, dtype=adapter).requires_grad_()
                    for shape in (ranks, (7, ranks[0]), (7, ranks[1]))
                )
                for _ in range(count)
            )
        ]
        formed = [tensor for own in form(entries) for tensor in own]
        with Casts() as mode:
            torch.autograd.backward(formed, [torch.ones_like(t) for t in formed])
        assert all(p.grad.dtype == adapter for entry in entries for p in entry.parameters)
        return mode.count

    assert casts(2) == casts(5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 6), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return torch.stack([torch.tanh(input @ self.weight[torch.tensor(e)].mT) for e in (0, 2, 3)])


@pytest.mark.parametrize("ranks", [(2, 3, 4), (3, 4, 3)])
def test_experts_that_merge_at_once_are_exact(ranks, monkeypatch):
    monkeypatch.setattr("flora.layers.execution.stand_in.pooled", lambda weight, execution: "merged")
    base, input = Experts(), torch.randn(7, 6, requires_grad=True)
    [(core, factors, scale)] = core_spaces([base], [ranks])
    own = [tensor.clone().requires_grad_() for tensor in (core, *factors)]

    def ours(input, core, *factors):
        base.weight, frozen = None, base.weight
        vars(base)["weight"] = StandIn.of(frozen, scale * core, factors, "auto")
        try:
            return base(input)
        finally:
            del vars(base)["weight"]
            base.weight = frozen

    weight = base.weight + scale * reconstruct(own[0], own[1:])
    want = gradients(functional_call(base, {"weight": weight}, input), [input, *own])
    torch.testing.assert_close(gradients(ours(input, *own), [input, *own]), want, **EXACT)
    assert torch.autograd.gradgradcheck(ours, (input, *own), fast_mode=True)


def test_the_form_of_each_weight():
    matrix = Weight("cuda", "matrix", (768, 3072), torch.float32, torch.bfloat16, True)
    convolution = matrix._replace(kind="convolution", shape=(CHANNELS, CHANNELS, 3, 3))
    stack = matrix._replace(kind="stack", shape=(8, 2048, 512))
    base, alone = {"dtype": torch.bfloat16}, {"factored": None, "merged": None}
    forms = {
        ("merged", matrix): {},
        ("merged", matrix._replace(trains=False)): {},
        ("factored", matrix._replace(shape=(4096, 4096))): {"merged": "merged"},
        ("factored", matrix._replace(shape=(2 * WIDTH, 2 * WIDTH))): {"merged": "merged"},
        ("factored", matrix._replace(**base)): {"merged": "delta"},  # rounded again, W would lose small updates
        ("factored", matrix._replace(dtype=torch.float16, low=torch.float16)): {"merged": "delta"},
        ("merged", convolution): {"factored": "kernel"},
        ("delta", convolution._replace(**base)): {"factored": "kernel", "merged": "delta"},
        ("kernel", convolution._replace(shape=(CHANNELS + 1, 8, 3, 3))): {"factored": "kernel"},
        ("merged", stack): alone,
        (None, stack._replace(trains=False)): alone,
        (None, stack._replace(**base)): alone,
        (None, stack._replace(shape=(8, 28672, 4096))): alone,  # of Mixtral 8x7B
        (None, stack._replace(shape=(128, 1536, 2048))): alone,  # each is small, all are not
    }
    cpu = matrix._replace(device="cpu", shape=(64, 64), low=torch.float32)
    forms |= {
        ("merged", cpu): {},
        ("delta", cpu._replace(low=torch.bfloat16)): {"merged": "merged"},
        ("delta", cpu._replace(dtype=torch.bfloat16, low=torch.bfloat16)): {"merged": "delta"},
        ("merged", cpu._replace(kind="convolution", shape=(32, 32, 3, 3))): {"factored": "kernel"},
        ("factored", cpu._replace(shape=(768, 768))): {"merged": "factored"},  # the layer itself merges
        ("kernel", cpu._replace(kind="convolution", shape=(64, 64, 3, 3))): {"factored": "kernel", "merged": "kernel"},
    }
    unmeasured = [
        cpu._replace(trains=False),
        cpu._replace(trains=False, shape=(768, 768)),
        matrix._replace(device="mps"),
    ]
    unmeasured += [stack._replace(device="cpu", shape=(4, 8, 8)), convolution._replace(device="xpu")]
    forms |= {(None, weight): alone for weight in unmeasured}
    for (auto, weight), others in forms.items():
        own = {"auto": auto, "factored": "factored", "merged": "merged"} | others
        assert {execution: pooled(weight, execution) for execution in own} == own, weight


def test_ranks_are_padded_for_half_precision_on_a_gpu():
    assert padded(15, torch.bfloat16, "cuda") == 16 and padded(15, torch.float32, "cuda") == 15
    assert padded(15, torch.bfloat16, "cpu") == 15
