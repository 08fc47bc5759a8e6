"""Reading a layer's weight: free for its type and shape, and W + ΔW wherever something computes with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from flora import FloraConfig
from reference import delta, layers


class Product(torch.autograd.Function):
    """x wᵀ, by a function that Python's overrides don't see."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.ops.aten.mm.default(x, w.t())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x


@pytest.fixture
def layer():
    config = FloraConfig(r=2, target_modules=["0"], init_weights=False)
    return layers(get_peft_model(nn.Sequential(nn.Linear(6, 4)).double(), config))[0]


def test_looking_at_a_weight_does_not_form_it(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "_weight_with", lambda *_: pytest.fail("W + ΔW was formed"))
    weight = layer.weight
    assert (weight.dtype, weight.device.type, weight.shape, len(weight)) == (torch.float64, "cpu", (4, 6), 4)
    assert weight.size(0) == 4 and weight.ndim == weight.dim() == 2 and weight.numel() == 24 and weight.requires_grad
    with torch.no_grad():
        assert not layer.weight.requires_grad
    assert torch.ones(2).to(layer.weight.dtype).dtype == torch.float64


USES = {
    "linear": F.linear,
    "method": lambda x, w: x.matmul(w.t()),
    "operator": lambda x, w: torch.ops.aten.mm(x, w.t()),
    "function": Product.apply,
    "compiled function": lambda x, w: torch._C._nn.linear(x, w),
    "entries": lambda x, w: torch.stack([x @ row for row in w], 1) + w[0, 0],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_computes_with_a_weight_sees_the_update(layer, use):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    space = layer.tucker_space["default"]
    results = []
    for weight in (layer.weight, layer.base_parameter + delta(space)):
        y = use(x, weight)
        assert type(y) is torch.Tensor
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *space.parameters()])])
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(use(x, layer.weight), results[1][0])


def test_a_weight_that_is_kept_is_a_tensor_as_any_other(layer):
    dense = layer.base_parameter + delta(layer.tucker_space["default"])
    weight = layer.weight
    assert "0." in repr(weight) and torch.allclose(weight, dense) and torch.allclose(weight.detach().clone(), dense)
    with torch.no_grad():
        frozen = layer.weight
        for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            torch.testing.assert_close(twin, dense)
    assert weight.data_ptr() and weight.numpy(force=True).shape == (4, 6)


def test_t5_forms_no_weight_that_it_only_looks_at(monkeypatch):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    model = get_peft_model(model, FloraConfig(r=2, target_modules=["wo"], init_weights=False)).eval()
    monkeypatch.setattr(type(layers(model)[0]), "_weight_with", lambda *_: pytest.fail("W + ΔW was formed"))
    tokens = torch.arange(5)[None]
    model(input_ids=tokens, decoder_input_ids=tokens)
