"""How an adapter starts, and the unified scale."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from flora import FloraConfig
from flora.layers.core_space import CoreSpace
from flora.layers.starts import LEAST, STARTS, rms, sample, start, unified_scale
from flora.tuner.starting import start_adapter
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
        space = CoreSpace(
            shape, ranks, unified_scale(*rms([sample(weight)]), shape, ranks, 0, init), dtype=torch.float64
        )
        start([space], init, [0])
        moved = space.core if init in ZERO_CORE else space.factors[0]
        moved.data = torch.randn_like(moved).sign()
        squares.append(space.delta().square().mean().item() / counted**2)
    width = min(ranks[0], math.prod(ranks[1:]))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(STARTS[init].growth * math.sqrt(width), rel=0.2)


@pytest.mark.parametrize("init", ["factor", "activations", "gradient"])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_default_starts_orthonormal_with_a_core_of_order_one(shape, ranks, init):
    space = CoreSpace(shape, ranks, dtype=torch.float64)
    start([space], init, [0])
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
        start([space], init, [0])
        (space.delta() * torch.randn(shape, dtype=torch.float64)).sum().backward()
        assert not space.delta().any()
        assert any(p.grad.any() for p in space.parameters())


def start_of(*sizes, seed=0, **config):
    """Of the first layer of a net with inner layers of these sizes."""
    net = nn.Sequential(*(nn.Linear(size, size) for size in sizes))
    torch.manual_seed(seed)
    model = get_peft_model(net, FloraConfig(r=2, target_modules=r"\d+", **config))
    return model, [p.detach().clone() for p in layers(model)[0].space("default").parameters()]


def test_a_seed_gives_a_layer_the_same_start_whatever_comes_after_it():
    _, alone = start_of(6)
    for sizes in [(6, 6), (6, 9)]:
        torch.testing.assert_close(start_of(*sizes)[1], alone)
    assert not torch.allclose(start_of(6, seed=1)[1][0], alone[0])


def test_layers_of_one_shape_differ():
    first, second = (layer.space("default") for layer in layers(start_of(6, 6)[0]))
    assert not torch.allclose(first.factors[1], second.factors[1]) and not torch.allclose(first.core, second.core)


def test_only_new_core_spaces_are_started():
    model, before = start_of(6, 6)
    start_adapter(model, "default", model.peft_config["default"])
    torch.testing.assert_close(list(layers(model)[0].space("default").parameters()), before)


def test_every_weight_gets_the_scale_of_its_own_size():
    """Of several types, and a large one, which is sampled."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8).double(), nn.Linear(8, 5).bfloat16(), nn.Linear(512, 300))
    for n, layer in enumerate(net):
        layer.weight.data *= 10 * (n + 1)
    for layer in layers(get_peft_model(net, FloraConfig(r=2, target_modules=r"\d+"))):
        size = layer.base_parameter.double().square().mean().sqrt().item()
        expected = unified_scale(size, layer.weight_shape, (2, 2), 0, "factor")
        assert layer.space("default").scale.item() == pytest.approx(expected, rel=0.02)


def test_an_explicit_scale_is_taken_as_it_is():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), FloraConfig(target_modules=["0"], scale=0.4, init="core"))
    assert layers(model)[0].tucker_space["default"].scale.item() == 0.4


def test_casting_a_model_does_not_round_its_scale():
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), FloraConfig(target_modules=["0"]))
    scale = layers(model)[0].tucker_space["default"].scale.item()
    model.to(torch.bfloat16).double()
    assert layers(model)[0].tucker_space["default"].scale.item() == scale
