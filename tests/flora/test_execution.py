"""The autograd functions themselves, the choice between them, and what must keep the layer from using them."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from flora import FloraConfig
from flora.layers.execution.convolution import Geometry, convolution
from flora.layers.execution.cost import EXECUTIONS, merges, pooled, wants_dense
from flora.layers.execution.matrix import matrix
from flora.layers.execution.stand_in import StandIn
from flora.tucker import reconstruct
from reference import layers

GEOMETRIES = {
    "1d": Geometry((1,), (1,), (1,), False, (0,), 1),
    "strided": Geometry((2, 1), (1, 0), (1, 2), False, (0, 0), 1),
    "grouped": Geometry((1, 2), (0, 1), (1, 1), False, (0, 0), 2),
    "depthwise": Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 4),
    "3d": Geometry((1, 1, 2), (0, 0, 1), (1, 1, 1), False, (0, 0, 0), 1),
    "transposed": Geometry((2, 1), (1, 0), (1, 2), True, (1, 0), 1),
    "transposed-grouped": Geometry((1, 2), (0, 1), (1, 1), True, (0, 1), 2),
}


def numbers(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def check(function, inputs, expected):
    torch.testing.assert_close(function(*inputs), expected, rtol=1e-9, atol=1e-10)
    assert gradcheck(function, inputs, fast_mode=True) and gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("way", ["factored", "merged"])
@pytest.mark.parametrize("ranks", [(2, 3), (3, 2)])
@pytest.mark.parametrize("rows", [(8,), (3, 5), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("few", [0, 48, 2**16])  # numbers; 48 is more than eight rows have, and less than their outputs
def test_matrix(way, ranks, rows, few, monkeypatch):
    monkeypatch.setattr("flora.layers.execution.matrix.FEW", few)
    x, weight, bias = numbers(*rows, 5), numbers(7, 5, grad=False), numbers(7)
    core, left, right = numbers(*ranks), numbers(7, ranks[0]), numbers(5, ranks[1])

    def adapted(x, bias, core, left, right):
        return matrix(x, weight, bias, core, left, right, way)

    check(adapted, (x, bias, core, left, right), F.linear(x, weight + left @ core @ right.mT, bias))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize(("way", "keep"), [("factored", 8), ("factored", 0), ("merged", 8), ("dense", 8)])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolution(way, keep, geometry, layout, monkeypatch):
    monkeypatch.setattr("flora.layers.execution.convolution._route", lambda *_: way)
    monkeypatch.setattr("flora.layers.execution.convolution.KEEP", keep)
    modes = len(geometry.stride)
    channels, kernel_size, kernel_ranks = (4, 8), (3, 2, 2)[:modes], (2, 2, 1)
    shape = channels if geometry.transposed else channels[::-1]
    shape = (shape[0], shape[1] // geometry.groups, *kernel_size)
    ranks = (2, min(2, shape[1]))
    x, bias = numbers(2, 4, *(5, 4, 4)[:modes]), numbers(8)
    ranks = (*ranks, *kernel_ranks[:modes])
    weight, core = numbers(*shape, grad=False), numbers(*ranks)
    factors = [numbers(size, rank) for size, rank in zip(shape, ranks, strict=True)]
    if modes == 2:
        x = x.detach().contiguous(memory_format=layout).requires_grad_()

    def adapted(x, bias, core, *factors):
        return convolution(x, weight, bias, core, factors, geometry, "auto")

    dense = weight + reconstruct(core, factors)
    check(adapted, (x, bias, core, *factors), torch.convolution(x, dense, bias, *geometry))


def test_convolution_with_a_large_depthwise_kernel():
    x, weight, core = numbers(2, 4, 7, 7), numbers(4, 1, 5, 5, grad=False), numbers(2, 1, 2, 3)
    factors = numbers(4, 2), numbers(1, 1), numbers(5, 2), numbers(5, 3)
    geometry = Geometry((1, 1), (2, 2), (1, 1), False, (0, 0), 4)

    def adapted(x, core, *factors):
        return convolution(x, weight, None, core, factors, geometry, "auto")

    dense = weight + reconstruct(core, factors)
    check(adapted, (x, core, *factors), torch.convolution(x, dense, None, *geometry))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("way", ["factored", "merged"])
def test_gradients_sample_by_sample_with_torch_func(layer, way):
    config = FloraConfig(r=2, target_modules=["0"], init_weights=False, execution=way)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)).double(), config)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = numbers(3, *((6,) if isinstance(layer, nn.Linear) else (6, 5, 5)), grad=False)

    def loss(weights, sample):
        return torch.func.functional_call(model, weights, (sample.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    whole = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum())(weights)
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient)


FORWARD = [(nn.Linear(6, 4), (6,)), (nn.Conv2d(6, 4, 3), (6, 5, 5)), (nn.ConvTranspose1d(6, 4, 3), (6, 5))]


@pytest.mark.parametrize(("layer", "shape"), FORWARD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("way", EXECUTIONS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, when first used
def test_forward_mode_derivatives(layer, shape, way):
    config = FloraConfig(r=2, target_modules=["0"], init_weights=False, execution=way)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)).double(), config)
    x, tangent = numbers(3, *shape, grad=False), numbers(3, *shape, grad=False)
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(derivative, torch.autograd.functional.jvp(model, x, tangent)[1])


def test_the_cost_model_merges_for_many_positions_and_keeps_large_weights_apart():
    assert merges("cpu", (768, 768), (16, 16), (16384, 16384)) and not merges("cpu", (768, 768), (16, 16), (128, 128))
    assert not merges("cpu", (4096, 4096), (16, 16), (512, 512))
    assert merges("cpu", (64, 64, 3, 3), (16, 16), (16384, 16384))
    assert wants_dense("cpu", (96, 1, 7, 7), (8, 1), (6272, 6272), 96)
    assert not wants_dense("cpu", (320, 320, 3, 3), (28, 28), (2048, 2048), 1)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_device_without_measurements_runs_factored_and_depthwise_kernels_dense(device):
    assert not merges(device, (768, 768), (16, 16), (16384, 16384))
    assert wants_dense(device, (96, 1, 7, 7), (8, 1), (6272, 6272), 96)
    close = (64, 64, 3, 3), (24, 24), (1024, 1024), 1  # a CPU takes half the time for a product of this size
    assert wants_dense("cpu", *close) and not wants_dense(device, *close)


SMALL = [(nn.Linear(6, 4), (6,)), (nn.Conv2d(6, 4, 3), (6, 5, 5)), (nn.ConvTranspose1d(6, 4, 3), (6, 5))]


@pytest.mark.parametrize(("layer", "shape"), SMALL, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("way", ["factored", "merged"])
def test_an_empty_batch(layer, shape, way):
    model, adapted = wrapped(copy.deepcopy(layer), execution=way)
    result = model(torch.randn(0, *shape, requires_grad=True))
    assert result.shape == layer(torch.randn(0, *shape)).shape
    result.sum().backward()
    assert not adapted.tucker_space["default"].core.grad.any()


AS_WEIGHT = [(nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5)), (nn.EmbeddingBag(6, 4, mode="max"), (3,))]


@pytest.mark.parametrize(("layer", "shape"), SMALL + AS_WEIGHT, ids=lambda value: type(value).__name__)
def test_a_trace_runs_without_python(layer, shape):
    model, _ = wrapped(copy.deepcopy(layer))
    x = torch.randint(6, (2, *shape)) if isinstance(layer, nn.EmbeddingBag) else torch.randn(2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what exporters use
        traced = torch.jit.trace(model.base_model.model, x)
    assert "PythonOp" not in str(traced.inlined_graph) and "^_" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


def test_a_compiled_model_takes_an_adapter_per_sample():
    torch.compiler.reset()
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), FloraConfig(r=2, target_modules=["0"], init_weights=False))
    model.eval().add_adapter("other", FloraConfig(r=2, target_modules=["0"], init_weights=False))
    x, inner = torch.randn(2, 6), model.base_model.model
    expected = model(x, adapter_names=["default", "other"])
    inner.compile(backend="eager")
    alone = model(x)
    torch.testing.assert_close(model(x, adapter_names=["default", "other"]), expected)
    torch.testing.assert_close(model(x), alone)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_peft_model_compiles_into_one_graph(dropout):
    torch.compiler.reset()
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    config = FloraConfig(r=2, target_modules=["0", "2"], init_weights=False, dropout=dropout)
    model, x = get_peft_model(base, config), torch.randn(2, 3, 4, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(x).requires_grad  # in training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


GRAPHS = [
    (nn.Linear(18, 8), (18,)),
    (nn.Conv2d(8, 6, 3, groups=2), (8, 5, 5)),
    (nn.Conv2d(8, 6, (3, 1)), (8, 5, 5)),
    (nn.ConvTranspose1d(8, 6, 3), (8, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), GRAPHS, ids=lambda value: type(value).__name__)
@pytest.mark.filterwarnings("ignore")  # dynamo's own, about torch internals
def test_a_graph_under_autocast_forms_delta_in_the_adapters_type(layer, shape):
    torch.compiler.reset()
    model, adapted = wrapped(copy.deepcopy(layer))
    exact, x = copy.deepcopy(model).double(), torch.randn(4, *shape).bfloat16().float()
    parameters = list(adapted.tucker_space["default"].parameters())
    products = []

    def backend(graph, inputs):
        def keep(part, inputs):
            products.extend(n.meta["val"].dtype for n in part.graph.nodes if "mm" in str(n.target))
            return make_boxed_func(part.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    with torch.autocast("cpu", torch.bfloat16):
        result = torch.compile(model, backend=backend, fullgraph=True)(x)
    gradient = torch.randn_like(result)
    own = torch.autograd.grad(result, parameters, gradient)
    expected = exact(x.double())
    wanted = [p for p in exact.parameters() if p.requires_grad]
    for mine, true in zip(own, torch.autograd.grad(expected, wanted, gradient.double()), strict=True):
        assert (mine - true).norm() <= 0.01 * true.norm()
    # on weights alone nothing is rounded on the way; a linear layer's own products are three, for input and weight
    assert products.count(torch.bfloat16) <= (5 if isinstance(layer, nn.Linear) else 0)


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_gradient_sample_by_sample_under_autocast():
    torch.compiler.reset()
    model, _ = wrapped(nn.Conv2d(6, 4, 3))
    weights, x = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, torch.randn(3, 6, 5, 5)

    def gradients(weights, x):
        def loss(weights, sample):
            with torch.autocast("cpu", torch.bfloat16):
                return torch.func.functional_call(model, weights, (sample[None],)).float().square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)

    compiled = torch.compile(gradients, backend="eager")(weights, x)
    for name, each in gradients(weights, x).items():
        torch.testing.assert_close(compiled[name], each, rtol=0.05, atol=0.05 * each.abs().max().item())


def wrapped(layer: nn.Module, **options):
    model = get_peft_model(nn.Sequential(layer), FloraConfig(r=2, target_modules=["0"], init_weights=False, **options))
    return model, layers(model)[0]


def test_a_hook_on_the_base_layer_is_called():
    base, calls = nn.Linear(6, 4), []
    model, _ = wrapped(base)
    x = torch.randn(2, 6)
    expected = model(x)
    base.register_forward_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(model(x), expected)
    own = base.forward
    base.forward = lambda x: calls.append("patched") or own(x)
    torch.testing.assert_close(model(x), expected)
    assert calls == ["hook", "patched", "hook"]


class Remembers(nn.Conv2d):
    """Keeps what it has seen, as attention layers keep their maps."""

    def forward(self, x):
        self.seen = x.sum()
        return self._conv_forward(x, self.weight, self.bias)


@torch.no_grad()
def test_a_layer_that_runs_as_a_weight_keeps_its_own_ways():
    base = Remembers(6, 6, 3, groups=6)
    model, adapted = wrapped(base)
    x = torch.randn(2, 6, 5, 5)
    expected, calls = model(x), []
    assert adapted.seen is base.seen and torch.equal(base.seen, x.sum())
    base.register_forward_hook(lambda *_: calls.append("hook"))
    own = base.forward

    def closure(x):
        return calls.append("closure") or own(x)

    def method(self, x):
        return calls.append("method") or type(self).forward(self, x)

    for patched in (closure, MethodType(method, base), partial(method, base), torch.compile(own, backend="eager")):
        base.forward = patched
        torch.testing.assert_close(model(x), expected)
    assert calls == ["closure", "hook", "method", "hook", "method", "hook", "hook"]
    del base.forward
    base.compile(backend="eager")
    torch.testing.assert_close(model(x), expected)
    assert isinstance(base.weight, nn.Parameter)


def test_a_hook_on_a_transposed_convolution_is_called_once():
    base, calls = nn.ConvTranspose2d(6, 4, 3, groups=2), []
    model, _ = wrapped(base, execution="factored")
    base.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape)))
    model(torch.randn(2, 6, 5, 5))
    assert calls == [(2, 6, 5, 5)]


def test_a_base_weight_that_trains_too_gets_its_gradient():
    base = nn.Linear(6, 4)
    model, _ = wrapped(base)
    base.requires_grad_(True)
    model(torch.randn(2, 6)).sum().backward()
    assert base.weight.grad is not None and base.bias.grad is not None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(18, 8),
        nn.Conv2d(16, 8, 3),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.ConvTranspose2d(16, 8, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["bfloat16", "autocast", "as on CUDA", "merged as on CUDA"])
def test_half_precision_loses_no_small_update(layer, way, monkeypatch):
    autocast = way == "autocast"
    if "CUDA" in way:  # the same arithmetic in the forms that it takes there
        monkeypatch.setattr(
            "flora.tuner.pooled_weight.pooled", lambda own, chosen: pooled(own._replace(device="cuda"), chosen)
        )
        monkeypatch.setattr("flora.tuner.live.may_pool", lambda *_: True)
    base = copy.deepcopy(layer).requires_grad_(False)
    base.bias.zero_()
    base.weight.fill_(1.0)  # the next bfloat16 is 2⁻⁷ away
    # any three neighbours sum to 0, and so does the base layer's output
    x = torch.tensor([1.0, -1.0, 0.0]).repeat(6)
    x = x if isinstance(layer, nn.Linear) else torch.randn(2, 16, 5, 1).bfloat16().float() * x
    model, adapted = wrapped(base, execution="merged" if "merged" in way else "auto")
    space = adapted.tucker_space["default"]
    with torch.no_grad():
        space.core.mul_(2.0**-10 / space.delta().abs().amax())
        alone = copy.deepcopy(layer)
        alone.weight.copy_(space.delta())
        expected = F.linear(x, alone.weight) if isinstance(layer, nn.Linear) else alone(x) - alone.bias.view(-1, 1, 1)
        if not autocast:
            model, x = model.bfloat16(), x.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = model(x).float()
    inner = slice(2, -2) if x.ndim > 1 else slice(None)  # a transposed convolution's edges see fewer neighbours
    size = expected.abs().max().item()
    torch.testing.assert_close(result[..., inner], expected[..., inner], rtol=0, atol=0.03 * size)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x, by_name=False):
        if by_name:  # ways that are right, if not fast
            turned = self.up.transpose(dim0=1, dim1=2)[0]
            return torch.mm(x, mat2=turned) + x @ torch.unbind(input=self.up)[1].T
        number = torch.tensor(2)
        each = [F.linear(x, up, bias=None) for up in self.up.unbind(dim=0)]
        return each[0] + x @ self.up[1].T + F.linear(x, self.up[number]) + torch.matmul(x, self.up[-1].transpose(0, 1))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_stack_is_formed_only_where_it_must_be(by_name, monkeypatch):
    config = FloraConfig(r=2, target_parameters=["0.up"], init_weights=False)
    model = get_peft_model(nn.Sequential(Stack()), config)
    layer, x = layers(model)[0], torch.randn(5, 6)
    expected = Stack()
    expected.up.data = layer.base_parameter + layer.get_delta_weight("default")
    if not by_name:
        monkeypatch.setattr(StandIn, "dense", lambda self: pytest.fail("the dense tensor was formed"))
    torch.testing.assert_close(layer(x, by_name), expected(x, by_name))


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for the backward pass beside the model's own tensors, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its place would be given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("way", EXECUTIONS)
@pytest.mark.parametrize(
    ("layer", "shape", "rank"),
    [(nn.Linear(64, 96), (320, 64), 8), (nn.Conv2d(32, 48, 3), (2, 32, 16, 16), 4)],
    ids=["Linear", "Conv2d"],
)
def test_no_more_is_kept_for_the_backward_pass_than_by_lora(layer, shape, rank, way):
    x = torch.randn(shape, requires_grad=True)
    lora = get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(r=rank, target_modules=["0"]))
    budget = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    config = FloraConfig(budget=budget, target_modules=["0"], execution=way)
    ours = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    assert saved_bytes(ours, x) <= saved_bytes(lora, x)
