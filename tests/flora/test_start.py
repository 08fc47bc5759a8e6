"""How an adapter starts: the unified scale, and the gradient start."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import flora
from cases import CASES
from flora import FloraConfig
from flora.layers.core_space import CoreSpace
from flora.layers.kinds import output_mode
from flora.layers.starts import GROWTH, STARTS, start, unified_scale
from flora.tucker import leading_vectors, project, unfold
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
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(STARTS[init].growth * math.sqrt(width), rel=0.2)


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
    growth = STARTS["factor"].growth / STARTS["gradient"].growth if scale == "auto" else 1.0
    assert sizes[0] == pytest.approx(growth * sizes[1], rel=1e-5)


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


def exact_start(gradient, ranks):
    """HOSVD of the whole gradient, output mode 0: the span of each factor, and of the core's rows seen from outside."""
    factors = [leading_vectors(unfold(gradient, mode), rank) for mode, rank in enumerate(ranks) if mode]
    small = project(gradient, [None, *factors])
    rows = leading_vectors(unfold(small, 0).mT, ranks[0])
    return [factor @ factor.mT for factor in factors], rows @ rows.mT


def test_two_passes_over_a_long_mode_find_what_the_whole_gradient_gives():
    """Wide enough for the bases of the first pass, of a spectrum that falls as gradients' do."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64)).Q for size in (150, 220))
    gradient = left @ torch.diag(0.7 ** torch.arange(60, dtype=torch.float64)) @ right.mT
    model = nn.Sequential(nn.Linear(220, 150, bias=False)).double()
    model = get_peft_model(model, FloraConfig(r=4, target_modules=["0"], init="gradient"))
    flora.initialize(
        model, [right.mT, right.mT], loss=lambda model, x: ((model(x)) * (left * 0.7 ** torch.arange(60)).mT).sum()
    )
    space = layers(model)[0].space("default")
    (span,), _ = exact_start(gradient, space.ranks)
    torch.testing.assert_close(space.factors[1] @ space.factors[1].mT, span, rtol=1e-6, atol=1e-7)


class Headed(nn.Module):
    """A body with dropout and running statistics, and a head that is to be trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def headed():
    torch.manual_seed(0)
    return get_peft_model(Headed(), FloraConfig(target_modules=["0"], init="gradient", modules_to_save=["head"]))


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def pairs(count=3):
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(count)]


def test_initialize_changes_nothing_but_the_adapter():
    model, batches = headed().eval(), pairs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    flora.initialize(model, batches, loss=cross_entropy)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"base_model.model.body.0.tucker_space.default.{name}" for name in ("core", "factor_1")}


def test_a_head_that_is_warmed_points_the_gradient():
    batches, starts = pairs(), []
    for steps in (0, 20, 20):
        model = headed()
        flora.initialize(model, batches, loss=cross_entropy, warmup_steps=steps)
        starts.append(layers(model)[0].space("default").factors[1].clone())
    assert torch.equal(starts[1], starts[2]) and not torch.allclose(starts[0], starts[1])


def test_initialize_keeps_a_trained_adapter_unless_told():
    model, batches = headed(), pairs()
    flora.initialize(model, batches, loss=cross_entropy)
    flora.initialize(model, batches, loss=cross_entropy)  # still at its start
    space = layers(model)[0].space("default")
    nn.init.ones_(space.factors[0])
    with pytest.raises(ValueError, match=r"has been trained: .* layer 'body.0' .* overwrite=True"):
        flora.initialize(model, batches, loss=cross_entropy)
    flora.initialize(model, batches, loss=cross_entropy, overwrite=True)
    assert not space.delta().any()


def test_a_missing_data_start_is_said_once():
    model, (x, _) = headed().train(), pairs()[0]
    with pytest.warns(UserWarning, match=r"init='gradient' and starts at random.*flora.initialize"):
        model(x)
    model(x)
    model = headed().train()
    flora.initialize(model, pairs(), loss=cross_entropy)
    model(x)


def test_the_trainer_callback_starts_the_adapter(tmp_path):
    base = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    config = FloraConfig(r=2, target_modules=["query"], init="gradient", modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    data = [{"input_ids": torch.randint(20, (5,)), "labels": torch.tensor(n % 2)} for n in range(12)]
    space = layers(model)[0].space("default")
    before = space.factors[1].clone()
    keys = {"report_to": "none", "use_cpu": True, "max_steps": 1, "learning_rate": 0.0, "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=4, **keys)
    Trainer(model, arguments, train_dataset=data, callbacks=[flora.Initialize(batches=2)]).train()
    assert space.started and not torch.allclose(space.factors[1], before)


class WithoutLoss(nn.Sequential):
    def forward(self, input):
        return SimpleNamespace(loss=None, logits=super().forward(input))


def without_loss():
    return get_peft_model(WithoutLoss(nn.Linear(4, 3)), FloraConfig(target_modules=["0"], init="gradient"))


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
    with pytest.raises(ValueError, match="does not depend on layer '0'"):
        flora.initialize(model, [torch.ones(2, requires_grad=True)], loss=lambda model, x: x.sum())
    with pytest.raises(ValueError, match="does not depend on layer '0'"):
        flora.initialize(model, [torch.ones(2)], loss=lambda model, x: x.sum())
    with pytest.raises(ValueError, match="needs labels"):
        flora.initialize(without_loss(), [{"input": torch.ones(2, 4)}])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tucker" not in n)
