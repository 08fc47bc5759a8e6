"""``flora.initialize``: the starts from data, against dense float64 references."""

import math
import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import flora
from cases import CASES
from flora import FloraConfig
from flora.layers.kinds import output_mode
from flora.layers.starts import STARTS
from flora.tucker import leading_vectors, project, unfold
from flora.tuner.data_start import activations
from flora.tuner.data_start.reduction import Products
from reference import first, layers, name_in_base, run
from test_contract import CLOSE, build

DATA_STARTS = [name for name, each in STARTS.items() if each.from_data]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_start = pytest.mark.parametrize("init", DATA_STARTS)


@pytest.mark.parametrize("scale", ["auto", 0.4])
@every_start
def test_a_data_start_has_the_size_of_the_default_at_any_scale(init, scale):
    """Under "auto", where each start has a c of its own, in units of that c."""
    sizes = []
    for each in ("factor", init):
        config = FloraConfig(r=2, target_modules=["0"], scale=scale, init=each)
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
        if each == init:
            flora.initialize(model, [torch.randn(8, 6)], loss=lambda model, x: model(x).square().sum())
        space = layers(model)[0].space("default")
        space.factors[0].data = torch.eye(5)[:, :2]  # orthonormal, so that delta has the size of the rest
        sizes.append(space.delta().norm().item() / (STARTS[each].growth if scale == "auto" else 1))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


@pytest.mark.parametrize("init", ["core", "factor", "official", "official-normal"])
def test_the_automatic_scale_suits_the_start_that_was_made(init):
    scales = []
    for each in ("gradient", init):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), FloraConfig(r=2, target_modules=["0"], init=each))
        for overwrite in (False, True):
            batches, loss = [torch.randn(8, 6)], lambda model, x: model(x).square().sum()
            flora.initialize(model, batches, loss=loss, overwrite=overwrite)
        scales.append(layers(model)[0].space("default").scale)
    assert scales[0] == scales[1]


def started(case, init):
    torch.manual_seed(0)
    model, base, args = build(case, init=init, init_weights=True)
    target = torch.randn_like(first(base(*args)))
    loss = lambda model, args: (first(model(*args)) * target).sum()  # noqa: E731
    flora.initialize(model, [args], loss=loss)
    return model, base, args, loss


@every_start
@every_case
def test_a_data_start_changes_no_output(case, init):
    model, base, args, loss = started(case, init)
    torch.testing.assert_close(first(model(*args)), first(base(*args)), **CLOSE)
    loss(model, args).backward()
    for layer in layers(model):
        space = layer.tucker_space["default"]
        output = output_mode(layer.roles)
        for factor in (factor for mode, factor in enumerate(space.factors) if mode != output):
            torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1], dtype=factor.dtype))
        assert space.core.isfinite().all() and space.factors[output].grad.any()


# ------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("case", [c for c in CASES if c.id.startswith(("Linear", "Conv1D"))], ids=lambda c: c.id)
def test_the_gradient_start_hears_the_leading_singular_values(case):
    """For two modes the output factor's gradient is s · ∇W · A · Gᵀ with A of orthonormal columns and G of orthogonal
    rows: as large as the gradient's leading singular values allow."""
    model, base, args, loss = started(case, "gradient")
    loss(model, args).backward()
    (layer,) = layers(model)
    space, output = layer.tucker_space["default"], output_mode(layer.roles)
    weight = layer.base_parameter.detach().clone().requires_grad_()
    loss(lambda *args: run(base, {"weight": weight}, args), args).backward()
    singular = torch.linalg.svdvals(weight.grad)[: min(space.ranks)]
    heard = space.factors[output].grad.norm().item()
    assert heard == pytest.approx(space.scale.item() * math.sqrt(max(space.ranks)) * singular.norm().item())


def falling(*sizes):
    """Matrices of orthonormal columns, and numbers for them that fall as a gradient's singular values do."""
    torch.manual_seed(0)
    return [torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64)).Q for size in sizes], 0.7 ** torch.arange(60)


def long_linear(init, **options):
    """A layer whose input mode is longer than the bases of the first pass."""
    model = nn.Sequential(nn.Linear(220, 150, bias=False)).double()
    return get_peft_model(model, FloraConfig(target_modules=["0"], init=init, **options))


def test_two_passes_over_a_long_mode_find_what_the_whole_gradient_gives():
    (left, right), values = falling(150, 220)
    model = long_linear("gradient", r=4)
    flora.initialize(model, [right.mT, right.mT], loss=lambda model, x: (model(x) * (left * values).mT).sum())
    factor = layers(model)[0].space("default").factors[1]
    span = leading_vectors(unfold((left * values) @ right.mT, 1), 4)
    torch.testing.assert_close(factor @ factor.mT, span @ span.mT, rtol=1e-6, atol=1e-7)


class Shared(nn.Sequential):
    """Calls a layer, changes what it gives in place, and reads the layer's weight once more."""

    def forward(self, x):
        return self[0](x).relu_() + nn.functional.linear(x.flip(-1), self[0].weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(220, 150)),
        lambda: nn.Sequential(Conv1D(150, 220)),
        lambda: Shared(nn.Linear(220, 150)),
    ],
)
@every_start
def test_a_linear_layer_starts_as_if_its_parts_were_formed(make, init, monkeypatch):
    """They are not: see ``Products``."""
    found = []
    for products in (Products.suit, staticmethod(lambda layer: False)):
        monkeypatch.setattr(Products, "suit", products)
        torch.manual_seed(0)
        model = get_peft_model(make().double(), FloraConfig(r=4, target_modules=["0"], init=init))
        flora.initialize(model, torch.randn(3, 7, 220).double().unbind(), loss=lambda m, x: m(x).sin().sum())
        (layer,) = layers(model)
        factor = layer.space("default").factors[1 - output_mode(layer.roles)]
        found.append(factor @ factor.mT)  # signs are free
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------------------------------------------- the activations


def moments(layer, base, args):
    """The centred second moments of all that meets the weight: of the rows of the Jacobian of the layer's outputs, less
    their mean over all positions of a channel. A tensor (outputs, I_1, …, I_N), whose squares they are."""
    jacobian = torch.autograd.functional.jacobian(
        lambda weight: run(base, {name_in_base(layer): weight}, args), layer.base_parameter.detach()
    )
    outputs = jacobian.ndim - layer.base_parameter.ndim
    channels = outputs - 1 - layer.roles.count("kernel")
    positions = [mode for mode in range(outputs) if mode != channels]
    return (jacobian - jacobian.mean(positions, keepdim=True)).flatten(0, outputs - 1)


def captured(directions, rows):
    """The share of the squares of ``rows`` (I, J) in some orthonormal directions (I, k), of the most there can be."""
    most = torch.linalg.svdvals(rows)[: directions.shape[1]].square().sum()
    return ((directions.mT @ rows).square().sum() / most).item() if most > 1e-20 else 1.0


@every_case
def test_the_activation_start_finds_the_leading_moments_of_the_inputs(case, monkeypatch):
    monkeypatch.setattr(activations, "SPARE", 800)  # random sums: the inputs of the cases have no leading directions
    model, base, args, _ = started(case, "activations")
    for layer in layers(model):
        rows, space, output = moments(layer, base, args), layer.space("default"), output_mode(layer.roles)
        factors = [None if mode == output else factor.detach() for mode, factor in enumerate(space.factors)]
        for mode, factor in enumerate(factors):
            if factor is not None:
                leading = factor if factor.shape[0] == factor.shape[1] else factor[:, : math.ceil(factor.shape[1] / 2)]
                assert captured(leading, unfold(rows, 1 + mode)) > 0.9
        small = unfold(project(rows, [None, *factors]), 1 + output)
        small = small.reshape(len(small), len(rows), -1).flatten(0, 1)
        if space.ranks[output] < small.shape[1]:
            leading = unfold(space.core.detach(), output)[: math.ceil(space.ranks[output] / 2)]
            assert captured(leading.mT, small.mT) > 0.9


def test_of_a_long_mode_thin_sums_are_enough():
    (_, right), values = falling(150, 220)
    model = long_linear("activations", r=8)
    inputs = [torch.randn(400, 60, dtype=torch.float64) * values @ right.mT + 5 for _ in range(3)]
    flora.initialize(model, inputs)
    centred = torch.cat([x - x.mean(0) for x in inputs])
    factor = layers(model)[0].space("default").factors[1].detach()
    assert captured(factor[:, :4], centred.mT) > 0.99
    beside = factor[:, 4:] - right @ (right.mT @ factor[:, 4:])
    assert beside.norm() > 1  # of 2: the other half is random


class Reader(nn.Module):
    """Reads a layer's weight, and never calls the layer, as some models of timm do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 5)

    def forward(self, x):
        return nn.functional.linear(x, self.qkv.weight)


class Repeated(nn.Module):
    """Calls a layer twice, on inputs of other features each time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        return self.layer(torch.cat([x, 0 * x], -1)) + self.layer(torch.cat([0 * x, 2 * x], -1))


@pytest.mark.parametrize(
    ("make", "inputs", "seen"),
    [
        (Reader, lambda: torch.randn(32, 6) * torch.tensor([0, 0, 9, 9, 0, 0]), [2, 3]),
        (Repeated, lambda: torch.randn(32, 3) * torch.tensor([0, 0, 1]), [2, 5]),
    ],
)
def test_every_use_of_a_weight_is_seen(make, inputs, seen):
    model = get_peft_model(nn.Sequential(make()), FloraConfig(r=4, target_modules=r"0\..*", init="activations"))
    flora.initialize(model, [inputs()])
    leading = layers(model)[0].space("default").factors[1][:, :2]
    assert leading[seen].square().sum().item() == pytest.approx(2, rel=1e-4)


@every_start
def test_the_projection_that_attention_only_reads_is_seen(init):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    model = get_peft_model(model, FloraConfig(r=2, target_modules=["out_proj"], init=init))
    before = layers(model)[0].space("default").factors[1].clone()
    flora.initialize(model, [torch.randn(4, 5, 8)], loss=lambda model, x: model(x).square().mean())
    assert not torch.allclose(layers(model)[0].space("default").factors[1], before)


# --------------------------------------------------------------------------------------------------------- initialize


class Headed(nn.Module):
    """A body with dropout and running statistics, and a head that is to be trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def headed(init="gradient"):
    torch.manual_seed(0)
    return get_peft_model(Headed(), FloraConfig(target_modules=["0"], init=init, modules_to_save=["head"]))


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def pairs(count=3):
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(count)]


def hooks(model):
    """How many each module has."""
    return [len(module._forward_hooks) for module in model.modules()]


@every_start
def test_initialize_changes_nothing_but_the_adapter(init):
    model, batches = headed(init).eval(), pairs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state, counts = torch.get_rng_state(), hooks(model)
    flora.initialize(model, batches, loss=cross_entropy)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == counts
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"base_model.model.body.0.tucker_space.default.{name}" for name in ("core", "factor_1")}


@every_start
def test_equal_seeds_and_batches_give_equal_starts(init):
    batches, starts = pairs(), []
    for _ in range(2):
        model = headed(init)
        flora.initialize(model, batches, loss=cross_entropy)
        starts.append(layers(model)[0].space("default").factors[1].clone())
    assert torch.equal(*starts)


def test_a_head_that_is_warmed_points_the_gradient():
    batches, starts = pairs(), []
    for steps in (0, 20):
        model = headed()
        flora.initialize(model, batches, loss=cross_entropy, warmup_steps=steps)
        starts.append(layers(model)[0].space("default").factors[1].clone())
    assert not torch.allclose(*starts)


@every_start
def test_initialize_keeps_a_trained_adapter_unless_told(init):
    model, batches = headed(init), pairs()
    flora.initialize(model, batches, loss=cross_entropy)
    flora.initialize(model, batches, loss=cross_entropy)  # still at its start
    space = layers(model)[0].space("default")
    nn.init.ones_(space.factors[0])
    with pytest.raises(ValueError, match=r"has been trained: .* layer 'body.0' .* overwrite=True"):
        flora.initialize(model, batches, loss=cross_entropy)
    flora.initialize(model, batches, loss=cross_entropy, overwrite=True)
    assert not space.delta().any()


@every_start
def test_a_missing_data_start_is_said_once(init):
    model, (x, _) = headed(init).train(), pairs()[0]
    with pytest.warns(UserWarning, match=rf"init='{init}' and starts at random.*flora.initialize"):
        model(x)
    model(x)
    model = headed(init).train()
    flora.initialize(model, pairs(), loss=cross_entropy)
    model(x)


class Made(Sequence):
    """Batches that are made when they are asked for, and how many of them were alive at once."""

    def __init__(self):
        self.alive, self.most = weakref.WeakSet(), 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        batch = torch.randn(2, 4, generator=torch.Generator().manual_seed(range(5)[index]))
        self.alive.add(batch)
        self.most = max(self.most, len(self.alive))
        return batch


@every_start
def test_a_sequence_is_read_batch_by_batch(init):
    starts, made = [], Made()
    for batches in (made, list(Made())):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), FloraConfig(r=2, target_modules=["0"], init=init))
        flora.initialize(model, batches, loss=lambda model, x: model(x).square().sum())
        starts.append(layers(model)[0].space("default").factors[1])
    torch.testing.assert_close(*starts)
    assert made.most <= 2  # the last one, and the next


@every_start
def test_the_trainer_callback_starts_the_adapter(init, tmp_path):
    base = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    config = FloraConfig(r=2, target_modules=["query"], init=init, modules_to_save=["classifier"])
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


def without_loss(init):
    return get_peft_model(WithoutLoss(nn.Linear(4, 3)), FloraConfig(target_modules=["0"], init=init))


@pytest.mark.parametrize("batch", [{"input": torch.ones(2, 4)}, torch.ones(2, 4)], ids=["dict", "tensor"])
def test_activations_need_no_labels(batch):
    model = without_loss("activations")
    flora.initialize(model, [batch])
    assert layers(model)[0].space("default").started


def refused(init, message, batches, loss=None, adapter="default"):
    """``initialize`` raises this, and leaves everything as it was."""
    model = without_loss(init)
    before, counts = {k: v.clone() for k, v in model.state_dict().items()}, hooks(model)
    with pytest.raises(ValueError, match=message):
        flora.initialize(model, batches, adapter, loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tucker" not in n)
    assert not layers(model)[0].space("default").started and hooks(model) == counts


def test_the_gradient_start_refuses_an_input_that_is_changed_in_place():
    class Careless(nn.Sequential):
        def forward(self, x):
            x = x + 0
            y = self[0](x)
            x += 1
            return y

    model = get_peft_model(Careless(nn.Linear(6, 5)), FloraConfig(target_modules=["0"], init="gradient"))
    with pytest.raises(ValueError, match="input of layer '0' was changed in place after its call"):
        flora.initialize(model, [torch.randn(8, 6)], loss=lambda model, x: model(x).sum())


@every_start
def test_initialize_refuses_and_changes_nothing(init):
    loss = lambda model, x: model(x).logits.sum()  # noqa: E731
    refused(init, "no batches", [], loss)
    refused(init, "no FLoRA adapter 'absent'", [torch.ones(2, 4)], loss, "absent")
    refused(init, "not finite", [torch.full((2, 4), torch.nan)], loss)
    refused(init, r"layer '0'.* to start from", [torch.ones(2)], lambda model, x: x.sum())
    refused(init, "a batch is a tuple.*pass loss=", [(torch.ones(2, 4),)])
    with pytest.raises(ValueError, match="layer '0' has no numbers in memory"):
        flora.initialize(without_loss(init).to("meta"), [torch.ones(2, 4)], loss=loss)
    model = without_loss(init)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        flora.initialize(model, [torch.ones(2, 4)], loss=loss)


def test_initialize_refuses_layers_that_share_factors():
    config = FloraConfig(r=2, target_modules=["0", "1"], stack="layers")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match=r"layer '0' shares factors \(stack\)"):
        flora.initialize(model, [torch.ones(2, 4)], loss=lambda model, x: model(x).sum())


def test_the_gradient_start_refuses_what_has_no_gradient():
    refused("gradient", "does not depend on layer '0'", [torch.ones(2, requires_grad=True)], lambda model, x: x.sum())
    refused("gradient", "needs labels", [{"input": torch.ones(2, 4)}])
