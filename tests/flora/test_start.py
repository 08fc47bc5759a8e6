"""How an adapter starts: the unified scale, and the gradient start."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

import flora
from cases import CASES
from flora import FloraConfig
from flora.layers.core_space import PART, CoreSpace, unified_scale
from flora.layers.kinds import output_mode
from reference import first, layers, run
from test_contract import CLOSE, build

SHAPES = [((64, 32), (8, 8)), ((96, 1, 7, 7), (12, 1, 4, 4)), ((8, 24, 40), (4, 6, 6)), ((256,), (16,))]


@pytest.mark.parametrize("size", [0.02, 5.0])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_a_unit_change_of_the_core_moves_the_weight_by_a_fixed_part_of_its_size(shape, ranks, size):
    weight = size * torch.randn(shape, dtype=torch.float64)
    ratios = []
    for _ in range(40):
        space = CoreSpace(shape, ranks, unified_scale(weight, 1, ranks), dtype=torch.float64)
        space.start("core", 0, unit=True)
        nn.init.normal_(space.core)
        ratios.append((space.delta().square().mean() / weight.square().mean()).item())
    assert 0.7 < math.sqrt(sum(ratios) / len(ratios)) / PART < 1.4


@pytest.mark.parametrize("init", ["core", "factor", "official"])
def test_every_start_leaves_the_update_zero_and_something_to_learn(init):
    for shape, ranks in SHAPES:
        space = CoreSpace(shape, ranks, dtype=torch.float64)
        space.start(init, 0, unit=True)
        (space.delta() * torch.randn(shape, dtype=torch.float64)).sum().backward()
        assert not space.delta().any()
        assert any(p.grad.any() for p in space.parameters())


def test_a_weight_of_zeros_still_has_a_scale():
    assert unified_scale(torch.zeros(8, 16), 16, (2, 2)) == pytest.approx(PART / 4 / 2)


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
    """For two modes the output factor's gradient is s · ∇W · A · Gᵀ with A and G of orthonormal rows of unit entries:
    as large as the gradient's leading singular values allow."""
    model, base, args, loss = gradient_start(case)
    loss(model, args).backward()
    (layer,) = layers(model)
    space, output = layer.tucker_space["default"], output_mode(layer.roles)
    weight = layer.base_parameter.detach().clone().requires_grad_()
    loss(lambda *args: run(base, {"weight": weight}, args), args).backward()
    singular = torch.linalg.svdvals(weight.grad)[: min(space.ranks)]
    unit = space.scale.item() * math.sqrt(space.shape[1 - output] * space.ranks[1 - output])
    heard = space.factors[output].grad.norm().item()
    assert heard == pytest.approx(unit * singular.norm().item(), rel=1e-9)


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
