"""How an adapter starts: the unified scale, and the gradient start."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

import flora
from cases import CASES
from flora import FloraConfig
from flora.layers.core_space import CoreSpace
from flora.layers.kinds import output_mode
from flora.layers.starts import GROWTH, STARTS, start, unified_scale
from reference import first, layers, run
from test_contract import CLOSE, build

SHAPES = [((64, 32), (8, 8)), ((96, 1, 7, 7), (12, 1, 4, 4)), ((8, 24, 40), (4, 6, 6)), ((256,), (16,))]


ZERO_CORE = ("core", "official", "official-normal")


@pytest.mark.parametrize("size", [0.02, 5.0])
@pytest.mark.parametrize("init", [*ZERO_CORE, "factor", "gradient"])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_first_step_moves_the_weight_by_a_fixed_share_of_its_size(shape, ranks, init, size):
    """Entries of the zero part at ±1, as a step of Adam at a learning rate of 1 would set them."""
    weight = size * torch.randn(shape, dtype=torch.float64)
    squares = []
    for _ in range(60):
        space = CoreSpace(shape, ranks, unified_scale(weight, ranks, 0, init), dtype=torch.float64)
        start(space, init, 0)
        moved = space.core if init in ZERO_CORE else space.factors[0]
        moved.data = torch.randn_like(moved).sign()
        squares.append((space.delta().square().mean() / weight.square().mean()).item())
    width = min(ranks[0], math.prod(ranks[1:]))
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(GROWTH * math.sqrt(width), rel=0.2)


@pytest.mark.parametrize("init", ["factor", "gradient"])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_default_starts_orthonormal(shape, ranks, init):
    space = CoreSpace(shape, ranks, dtype=torch.float64)
    start(space, init, 0)
    for factor in space.factors[1:]:
        torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1], dtype=torch.float64))
    rows = space.core.reshape(ranks[0], -1)
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.mT
    torch.testing.assert_close(rows @ rows.mT, torch.eye(rows.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("init", [name for name in STARTS if name != "random"])
def test_every_start_leaves_the_update_zero_and_something_to_learn(init):
    for shape, ranks in SHAPES:
        space = CoreSpace(shape, ranks, dtype=torch.float64)
        start(space, init, 0)
        (space.delta() * torch.randn(shape, dtype=torch.float64)).sum().backward()
        assert not space.delta().any()
        assert any(p.grad.any() for p in space.parameters())


def test_a_weight_of_zeros_still_has_a_scale():
    assert unified_scale(torch.zeros(8, 16), (2, 2), 0, "factor") == pytest.approx(GROWTH)


@pytest.mark.parametrize("scale", ["auto", 0.4])
def test_the_gradient_start_has_the_size_of_the_default_at_any_scale(scale):
    sizes = []
    for init in ("factor", "gradient"):
        config = FloraConfig(r=2, target_modules=["0"], scale=scale, init=init)
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
        if init == "gradient":
            flora.initialize(model, [torch.randn(8, 6)], loss=lambda model, x: model(x).square().sum())
        space = layers(model)[0].space("default")
        space.factors[0].data = torch.eye(5)[:, :2]  # orthonormal, so that delta has the size of the rest
        sizes.append(space.delta().norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_an_explicit_scale_is_taken_as_it_is():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), FloraConfig(target_modules=["0"], scale=0.4, init="core"))
    assert layers(model)[0].tucker_space["default"].scale.item() == 0.4


def test_casting_a_model_does_not_round_its_scale():
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), FloraConfig(target_modules=["0"]))
    scale = layers(model)[0].tucker_space["default"].scale.item()
    model.to(torch.bfloat16).double()
    assert layers(model)[0].tucker_space["default"].scale.item() == scale


def gradient_start(case):
    model, base, args = build(case, init="gradient", init_weights=True)
    target = torch.randn_like(first(base(*args)))
    loss = lambda model, args: (first(model(*args)) * target).sum()  # noqa: E731
    flora.initialize(model, [args], loss=loss)
    return model, base, args, loss


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_gradient_start_changes_no_output(case):
    model, base, args, loss = gradient_start(case)
    torch.testing.assert_close(first(model(*args)), first(base(*args)), **CLOSE)
    loss(model, args).backward()
    for layer in layers(model):
        space = layer.tucker_space["default"]
        assert all(torch.isfinite(tensor).all() for tensor in (space.core, *space.factors))
        assert space.factors[output_mode(layer.roles)].grad.any()


@pytest.mark.parametrize("case", [c for c in CASES if c.id.startswith(("Linear", "Conv1D"))], ids=lambda c: c.id)
def test_the_gradient_start_hears_the_leading_singular_values(case):
    """For two modes the output factor's gradient is s · ∇W · A · Gᵀ with A of orthonormal columns and G of orthonormal
    rows: as large as the gradient's leading singular values allow."""
    model, base, args, loss = gradient_start(case)
    loss(model, args).backward()
    (layer,) = layers(model)
    space, output = layer.tucker_space["default"], output_mode(layer.roles)
    weight = layer.base_parameter.detach().clone().requires_grad_()
    loss(lambda *args: run(base, {"weight": weight}, args), args).backward()
    singular = torch.linalg.svdvals(weight.grad)[: min(space.ranks)]
    heard = space.factors[output].grad.norm().item()
    assert heard == pytest.approx(space.scale.item() * singular.norm().item(), rel=1e-9)


def test_initialize_refuses_and_changes_nothing():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), FloraConfig(target_modules=["0"], init="gradient"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss = lambda model, x: model(x).sum()  # noqa: E731
    with pytest.raises(ValueError, match="no batches"):
        flora.initialize(model, [], loss=loss)
    with pytest.raises(ValueError, match="no FLoRA adapter 'absent'"):
        flora.initialize(model, [torch.ones(2, 4)], adapter="absent", loss=loss)
    with pytest.raises(ValueError, match="not finite"):
        flora.initialize(model, [torch.full((2, 4), torch.nan)], loss=loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tucker" not in n)
