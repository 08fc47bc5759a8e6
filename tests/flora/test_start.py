"""How an adapter starts, and the unified scale."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from flora import FloraConfig
from flora.layers.core_space import CoreSpace
from flora.layers.starts import LEAST, STARTS, start, unified_scale
from reference import layers

SHAPES = [((64, 32), (8, 8)), ((96, 1, 7, 7), (12, 1, 4, 4)), ((8, 24, 40), (4, 6, 6)), ((256,), (16,))]


ZERO_CORE = ("core", "official", "official-normal")


@pytest.mark.parametrize("size", [0.0, 0.02, 5.0])
@pytest.mark.parametrize("init", [*ZERO_CORE, "factor", "activations", "gradient"])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_first_step_moves_the_weight_by_a_fixed_share_of_its_size(shape, ranks, init, size):
    """Entries of the zero part at ±1, as a step of Adam at a learning rate of 1 would set them.

    A weight smaller than `LEAST` over the root of its fan-in counts as one of that size.
    """
    weight = size * torch.randn(shape, dtype=torch.float64)
    counted = max(weight.square().mean().sqrt().item(), LEAST / math.sqrt(math.prod(shape[1:])))
    squares = []
    for _ in range(60):
        space = CoreSpace(shape, ranks, unified_scale(weight, ranks, 0, init), dtype=torch.float64)
        start(space, init, 0)
        moved = space.core if init in ZERO_CORE else space.factors[0]
        moved.data = torch.randn_like(moved).sign()
        squares.append(space.delta().square().mean().item() / counted**2)
    width = min(ranks[0], math.prod(ranks[1:]))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(STARTS[init].growth * math.sqrt(width), rel=0.2)


@pytest.mark.parametrize("init", ["factor", "activations", "gradient"])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_default_starts_orthonormal_with_a_core_of_order_one(shape, ranks, init):
    space = CoreSpace(shape, ranks, dtype=torch.float64)
    start(space, init, 0)
    for factor in space.factors[1:]:
        torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1], dtype=torch.float64))
    rows = space.core.reshape(ranks[0], -1)
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.mT
    torch.testing.assert_close(rows @ rows.mT, rows.shape[1] * torch.eye(rows.shape[0], dtype=torch.float64))
    assert rows.square().mean().item() == pytest.approx(1)


@pytest.mark.parametrize("init", [name for name in STARTS if name != "random"])
def test_every_start_leaves_the_update_zero_and_something_to_learn(init):
    for shape, ranks in SHAPES:
        space = CoreSpace(shape, ranks, dtype=torch.float64)
        start(space, init, 0)
        (space.delta() * torch.randn(shape, dtype=torch.float64)).sum().backward()
        assert not space.delta().any()
        assert any(p.grad.any() for p in space.parameters())


def test_an_explicit_scale_is_taken_as_it_is():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), FloraConfig(target_modules=["0"], scale=0.4, init="core"))
    assert layers(model)[0].tucker_space["default"].scale.item() == 0.4


def test_casting_a_model_does_not_round_its_scale():
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), FloraConfig(target_modules=["0"]))
    scale = layers(model)[0].tucker_space["default"].scale.item()
    model.to(torch.bfloat16).double()
    assert layers(model)[0].tucker_space["default"].scale.item() == scale
