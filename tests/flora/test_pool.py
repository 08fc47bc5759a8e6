"""The pool of a forward: every form against the dense weight in float64, and what must not use it, or not see it."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import CASES
from flora import FloraConfig
from flora.layers.execution import pool
from flora.layers.execution.cost import THIN
from flora.tuner import live
from reference import delta, first, forward, layers
from test_contract import CLOSE, build

POOLED = [case for case in CASES if layers(build(case)[0])[0].poolable]
FORMS = ["merged", "delta", "thin", "thin by plain operations"]


@pytest.fixture
def formed(monkeypatch):
    """The entries that were formed, in order."""
    entries = []
    monkeypatch.setattr("flora.tuner.live.form", lambda own, **pads: entries.extend(own) or pool.form(own, **pads))
    return entries


def choose(monkeypatch, form):
    if form == "thin by plain operations":
        monkeypatch.setattr("flora.tuner.pooled_weight.adds_in_place", lambda device: False)
    pooled = lambda weight, execution: THIN[weight.kind] if form.startswith("thin") else form  # noqa: E731
    monkeypatch.setattr("flora.tuner.pooled_weight.pooled", pooled)
    monkeypatch.setattr("flora.tuner.live.may_pool", lambda *_: True)


def chain(*base: nn.Module, r=2, **options):
    """(a model of these layers with adapters on all, a function that gives its output with dense weights)."""
    model = nn.Sequential(*(part for layer in base for part in (layer, nn.Tanh()))).double()
    targets = [str(2 * n) for n in range(len(base))]
    model = get_peft_model(model, FloraConfig(r=r, target_modules=targets, init_weights=False, **options))

    def dense(x):
        for part in model.base_model.model:
            if layers(part):
                weight = part.base_parameter + delta(part.tucker_space["default"])
                part = partial(torch.func.functional_call, part.base_layer, {"weight": weight})
            x = part(x)
        return x

    return model, dense


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def agree(run, dense, model, x):
    """Outputs and all gradients."""
    results = []
    for function in (run, dense):
        own = x.clone().requires_grad_()
        y = function(own)
        results.append([y, *torch.autograd.grad((y * torch.cos(y.detach() + 1)).sum(), [own, *trained(model)])])
    torch.testing.assert_close(*results, **CLOSE)


LINEAR = [lambda: nn.Linear(7, 7), lambda: nn.Linear(7, 7, bias=False), lambda: nn.Linear(7, 5)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", POOLED, ids=lambda case: case.id)
def test_every_form_is_that_of_the_dense_weight(case, form, monkeypatch, formed):
    choose(monkeypatch, form)
    model, base, args = build(case)
    x = args[0].requires_grad_()
    result, expected = first(model(*args)), forward(model, base, args, {"default": 1.0})
    assert len(formed) == 1
    torch.testing.assert_close(result, expected, **CLOSE)
    wanted, head = [x, *trained(model)], torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * head).sum(), wanted) for y in (result, expected))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, [2, 3], [3, 2]], ids=str)
def test_layers_of_several_shapes(form, ranks, monkeypatch, formed):
    choose(monkeypatch, form)
    model, dense = chain(*(make() for make in LINEAR), r=ranks)
    agree(model, dense, model, torch.randn(4, 7, dtype=torch.float64))
    assert len(formed) == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 1, 3, 7)], ids=str)
def test_inputs_of_every_number_of_modes(form, shape, monkeypatch, formed):
    choose(monkeypatch, form)
    model, dense = chain(*(make() for make in LINEAR))
    agree(model, dense, model, torch.randn(shape, dtype=torch.float64))
    assert len(formed) == 3


@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"groups": 6}, {"stride": 2, "dilation": 2}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_convolutions(form, options, layout, monkeypatch):
    choose(monkeypatch, form)
    bases = [nn.Conv2d(6, 6, 3, padding=2, **options).to(memory_format=layout) for _ in range(2)]
    model, dense = chain(*bases, nn.Conv2d(6, 4, 1), r=3)
    agree(model, dense, model, torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=layout))


@pytest.mark.parametrize("form", FORMS)
def test_padded_ranks(form, monkeypatch):
    choose(monkeypatch, form)
    monkeypatch.setattr("flora.layers.execution.formed.padded", lambda rank, dtype, device: 8)
    model, dense = chain(*(make() for make in LINEAR), r=[3, 2])
    agree(model, dense, model, torch.randn(4, 7, dtype=torch.float64))
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *own: model(x), (x, *trained(model)), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form, monkeypatch):
    choose(monkeypatch, form)
    model, _ = chain(nn.Linear(4, 4), nn.Linear(4, 3), r=[2, 3])
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *own: model(x), (x, *trained(model)), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_takes_no_part_gets_no_gradient(form, monkeypatch):
    choose(monkeypatch, form)
    model, _ = chain(*(nn.Linear(5, 5) for _ in range(3)))
    inner = model.base_model.model
    inner.forward = lambda x: inner[4](inner[0](x))  # the middle one is formed, too, and not called
    model(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    has = [[p.grad is not None for p in layer.tucker_space["default"].parameters()] for layer in layers(model)]
    assert has == [[True] * 3, [False] * 3, [True] * 3]


class Block(nn.Module):
    """Two layers, one of them called twice, perhaps in a checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(5, 5), nn.Linear(5, 5), reentrant

    def run(self, x):
        return self.a(torch.tanh(self.b(torch.tanh(self.a(x)))))

    def forward(self, x):
        return self.run(x) if self.reentrant is None else checkpoint(self.run, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpoints_and_layers_called_twice(reentrant, form, monkeypatch):
    choose(monkeypatch, form)
    base = nn.Sequential(Block(reentrant), nn.Linear(5, 5), Block(reentrant)).double()
    model = get_peft_model(base, FloraConfig(r=2, target_modules=["a", "b", "1"], init_weights=False))
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.reentrant = None
    results = []
    for own in (model, plain):
        x = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5).requires_grad_()
        run = own if own is model else own.base_model.model.forward  # without hooks, so without a pool
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in trained(own))])
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_forwards_and_backwards_in_any_order(form, monkeypatch):
    choose(monkeypatch, form)
    model, dense = chain(*(make() for make in LINEAR))
    x, other = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    agree(lambda own: model(own) * model(other), lambda own: dense(own) * dense(other), model, x)
    loss = model(x).square().sum()
    once = torch.autograd.grad(loss, trained(model), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, trained(model)), once, rtol=0, atol=0)


def test_each_step_sees_the_parameters_of_its_time(formed):
    model, dense = chain(*(make() for make in LINEAR))
    x = torch.randn(2, 7, dtype=torch.float64)

    def same():
        torch.testing.assert_close(model(x), dense(x), **CLOSE)

    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        same()
    for parameter in trained(model):
        parameter.data.mul_(1.5)
    same()
    with torch.no_grad():
        same()
    layers(model)[0].set_scale("default", 3.0)
    before, zero = model(x), layers(model)[0].tucker_space["default"].scale
    layers(model)[0].set_scale("default", 1.0)
    zero.mul_(3.0)
    torch.testing.assert_close(model(x), before, **CLOSE)
    same()
    model.float()
    torch.testing.assert_close(model(x.float()), dense(x.float()), rtol=1e-5, atol=1e-5)
    model.double()
    same()
    assert len(formed) % 3 == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_wants_the_parameters_of_the_forward_pass(form, monkeypatch):
    choose(monkeypatch, form)
    model, _ = chain(nn.Linear(4, 4))
    loss = model(torch.randn(2, 4, dtype=torch.float64)).square().sum()
    expected = torch.autograd.grad(loss, trained(model), retain_graph=True)
    with torch.no_grad():
        trained(model)[0].mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, trained(model), retain_graph=True), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="have changed since the forward pass"):
        torch.autograd.grad(loss, trained(model), create_graph=True)


def test_without_gradients_convolutions_are_formed_and_matrices_are_not(formed):
    model, dense = chain(nn.Conv2d(3, 3, 1), nn.Linear(5, 5), nn.Conv2d(3, 3, 3, padding=1))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for grad, count in ((True, 3), (False, 2), (True, 3)):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), dense(x), **CLOSE)
        assert len(formed) == count
        formed.clear()


def test_what_must_not_use_the_pool(formed):
    model, dense = chain(nn.Linear(5, 5), nn.Linear(5, 5))
    layer, x = layers(model)[0], torch.randn(2, 5, dtype=torch.float64)

    def own(count, random=False):
        """Whether ``count`` of the layers had something formed."""
        result = model(x)
        if not random:
            torch.testing.assert_close(result, dense(x), **CLOSE)
        assert len(formed) == count
        formed.clear()

    own(2)
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    own(1)
    handle.remove()
    layer.base_layer.requires_grad_(True)
    own(1)
    layer.base_layer.requires_grad_(False)
    layer.tucker_dropout["default"] = 0.5
    own(1, random=True)
    model.eval()
    own(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        own(0)
    model.merge_adapter()
    assert model(x).shape == (2, 5) and not formed
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model(x).shape == (2, 5) and not formed
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), dense(x), **CLOSE)
    assert not formed
    layer(x)  # outside the model's forward
    assert not formed
    model.add_adapter("other", FloraConfig(r=2, target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert model(x).shape == (2, 5) and not formed


def test_nothing_outlives_a_forward():
    model, _ = chain(nn.Linear(5, 5))
    x = torch.randn(2, 5, dtype=torch.float64)
    inside, inner = [], model.base_model.model
    inner[1].register_forward_hook(lambda *_: inside.append(live.live()))
    model(x)
    assert inside[0] is not None and live.live() is None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :3])
    assert live.live() is None
    inner[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert live.live() is None


@pytest.mark.parametrize("keeps", [False, True])
def test_without_gradients_only_one_chunk_is_alive(keeps, monkeypatch, formed):
    choose(monkeypatch, "merged")
    monkeypatch.setattr("flora.tuner.live.CHUNK", 2 * 25)
    model, dense = chain(*(nn.Linear(5, 5) for _ in range(6)))
    alive, inner, x = [], model.base_model.model, torch.randn(2, 5, dtype=torch.float64)
    for part in layers(model):
        part.register_forward_hook(lambda *_: alive.append(sum(r is not None for r in live.live().ready.values())))
    with torch.set_grad_enabled(keeps):
        torch.testing.assert_close(model(x), dense(x), **CLOSE)
    assert alive == ([2, 2, 4, 4, 6, 6] if keeps else [2] * 6) and len(formed) == 6
    # layers of two chunks in turn, and again: no chunk is formed over and over
    order = [0, 4, 2, 6, 0, 4]
    inner.forward = lambda x: x + sum(inner[n](x) for n in order)
    formed.clear(), alive.clear()
    with torch.set_grad_enabled(keeps):
        y = model(x)
    wanted = x + sum(nn.functional.linear(x, own.weight, own.bias) for own in (inner[n] for n in order))
    torch.testing.assert_close(y, wanted, **CLOSE)
    assert max(alive) == (4 if keeps else 2) and len(formed) == (4 if keeps else 8)


def test_copies_and_pickles_have_pools_of_their_own(formed):
    model, _ = chain(*(make() for make in LINEAR))
    x = torch.randn(2, 7, dtype=torch.float64)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        formed.clear()
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        own = {id(p) for p in twin.parameters()}
        assert len(formed) == 3 and all(id(p) in own for entry in formed for p in entry.parameters)
    base = model.merge_and_unload()
    assert not base._forward_pre_hooks and not base._forward_hooks and not hasattr(base, "_flora_chunks")


def test_threads_share_a_model_and_no_pool():
    model, dense = chain(*(make() for make in LINEAR))
    inputs = torch.randn(4, 3, 7, dtype=torch.float64)
    expected, wrong = [dense(x) for x in inputs], []

    def run(x, y):
        wrong.extend(x for _ in range(20) if not torch.allclose(model(x), y))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
