"""``flora.initialize``: the starts from data, against dense float64 references."""

import math
import random
import weakref
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
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


def test_bases_in_half_precision_cost_the_start_little():
    (left, right), values = falling(150, 220)
    model = nn.Sequential(nn.Linear(220, 150, bias=False)).bfloat16()
    model = get_peft_model(model, FloraConfig(target_modules=["0"], init="gradient", r=4))
    batches = [right.mT.bfloat16()]
    flora.initialize(model, batches, loss=lambda model, x: (model(x) * (left * values).mT).sum())
    factor = layers(model)[0].space("default").factors[1].detach()
    torch.testing.assert_close(factor.mT @ factor, torch.eye(4), rtol=0, atol=1e-5)
    span = leading_vectors(unfold((left * values) @ right.mT, 1), 4).float()
    torch.testing.assert_close(factor @ factor.mT, span @ span.mT, rtol=0, atol=0.02)


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
        flora.initialize(model, list(torch.randn(3, 7, 220).double()), loss=lambda m, x: m(x).sin().sum())
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
    """A body with dropout, running statistics and a buffer that is assigned, and a head that is to be trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + self.training
        return self.head(self.body(x))


class Deep(Headed):
    """The gradient of the first layer is autograd's; what the second gets depends on the first one's update."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.Flatten(), nn.Linear(32, 8))


def headed(init="gradient", base=Headed, targets=("0",)):
    torch.manual_seed(0)
    return get_peft_model(base(), FloraConfig(target_modules=targets, init=init, modules_to_save=["head"]))


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def pairs(count=3):
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(count)]


def hooks(model):
    """How many each module has."""
    return [len(module._forward_hooks) for module in model.modules()]


def drawn(count=3):
    """Batches of which each is drawn when its turn comes, from the random numbers of everybody."""
    for x, y in pairs(count):
        yield x + torch.randn(()) + random.random() + np.random.rand(), y


def random_states():
    return str((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()))


@pytest.mark.parametrize("batches", [pairs, drawn])
@every_start
def test_initialize_changes_nothing_but_the_adapter(init, batches):
    model, batches = headed(init).eval(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    gradients = [p.grad for p in model.parameters()]
    states, counts = random_states(), hooks(model)
    flora.initialize(model, batches, loss=cross_entropy)
    assert random_states() == states and not model.training
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is g and (g == 1).all() for p, g in zip(model.parameters(), gradients, strict=True))
    assert hooks(model) == counts
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"base_model.model.body.0.tucker_space.default.{name}" for name in ("core", "factor_1")}


def leave_gradients(model):
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)


def train(model, adapter="default"):
    for layer in layers(model):
        for p in layer.space(adapter).parameters():
            nn.init.normal_(p)


def take_another_adapter(model):
    model.add_adapter("other", FloraConfig(target_modules=["1", "3"], modules_to_save=["head"]))
    model.set_adapter("other")
    nn.init.normal_(model.base_model.model.head.modules_to_save["other"].weight)
    train(model, "other")


@pytest.mark.parametrize(
    "disturb",
    [
        leave_gradients,
        train,
        take_another_adapter,
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: torch.set_grad_enabled(False),
    ],
)
@every_start
def test_a_start_depends_on_nothing_but_base_head_and_batches(init, disturb):
    batches, starts = pairs(), []
    for change in (lambda model: None, disturb):
        model = headed(init, Deep, ["1", "3"])
        with torch.enable_grad():
            change(model)
            names = [(m._active_adapter, m._disable_adapters) for m in model.modules() if hasattr(m, "_active_adapter")]
            torch.manual_seed(1)
            flora.initialize(model, batches, loss=cross_entropy, overwrite=True)
        starts.append([p.detach() for layer in layers(model) for p in layer.space("default").parameters()])
    torch.testing.assert_close(*starts)
    assert names == [(m._active_adapter, m._disable_adapters) for m in model.modules() if hasattr(m, "_active_adapter")]


@every_start
def test_a_trained_adapter_keeps_its_numbers_if_its_new_start_fails(init):
    model = headed(init)
    train(model)
    before = [p.clone() for p in layers(model)[0].space("default").parameters()]
    with pytest.raises(ValueError, match="not finite"):
        flora.initialize(model, [(torch.full((16, 6), torch.nan), pairs()[0][1])], loss=cross_entropy, overwrite=True)
    for p, kept in zip(layers(model)[0].space("default").parameters(), before, strict=True):
        assert torch.equal(p, kept)


@every_start
def test_what_is_kept_in_evaluation_mode_stays_so(init):
    seen = []

    def loss(model, batch):
        seen.append((model.base_model.model.body[1].training, model.base_model.model.body[2].training))
        return cross_entropy(model, batch)

    model = headed(init).train()
    model.base_model.model.body[1].eval()
    flora.initialize(model, pairs(1), loss=loss)
    assert set(seen) == {(False, True)}


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
    message, x = rf"init='{init}' and starts at random.*flora.initialize", pairs()[0][0]
    model = headed(init).train()
    with pytest.raises(ValueError, match="not finite"):
        flora.initialize(model, [(x * torch.nan, pairs()[0][1])], loss=cross_entropy)
    with pytest.warns(UserWarning, match=message):
        model(x)
    model(x)
    model.add_adapter("other", FloraConfig(target_modules=["0"], init=init, modules_to_save=["head"]))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match=f"adapter 'other' has {message}"):
        model(x)
    started, loaded = headed(init).train(), headed(init).train()
    flora.initialize(started, pairs(), loss=cross_entropy)
    started(x)
    nn.init.ones_(layers(started)[0].space("default").factors[0])
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(started))
    loaded(x)


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


class Endless(Dataset):
    """It has a length, but no index is too high."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.ones(2, 4)


@pytest.mark.parametrize(("batches", "read"), [(lambda: (torch.ones(2, 4) for _ in count()), 32), (Endless, 4)])
def test_of_what_is_no_sequence_the_first_batches_are_read(batches, read):
    calls = []
    loss = lambda model, x: calls.append(x) or model(x).logits.square().sum()  # noqa: E731
    flora.initialize(without_loss("gradient"), batches(), loss=loss, warmup_steps=0)
    assert len(calls) == read


class Outputs(nn.Linear):
    """Returns what a Trainer accepts: a dict or a tuple with the loss."""

    def __init__(self, kind):
        super().__init__(4, 3)
        self.kind = kind

    def forward(self, input, labels):
        logits = super().forward(input)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.kind is dict else (loss, logits)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_the_loss_is_found_where_a_trainer_looks(kind):
    model = get_peft_model(nn.ModuleDict({"0": Outputs(kind)}), FloraConfig(target_modules=["0"], init="gradient"))
    model.base_model.model.forward = lambda **batch: model.base_model.model["0"](**batch)
    flora.initialize(model, [{"input": torch.randn(2, 4), "labels": torch.tensor([0, 2])}])
    assert layers(model)[0].space("default").started


def test_a_head_in_half_precision_is_warmed():
    batches, starts = pairs(), []
    for dtype in (torch.float32, torch.float16):
        model = headed()
        model.base_model.model.head.to(dtype)
        loss = lambda model, batch, dtype=dtype: nn.functional.cross_entropy(  # noqa: E731
            model.base_model.model.head(model.base_model.model.body(batch[0]).to(dtype)).float(), batch[1]
        )
        torch.manual_seed(1)
        flora.initialize(model, batches, loss=loss)
        starts.append(layers(model)[0].space("default").factors[1].detach())
    overlap = (starts[0].mT @ starts[1]).square().sum() / starts[0].shape[1]
    assert overlap > 0.98


# ------------------------------------------------------------------------------------------------------- the callback


class Rows(Dataset):
    """Examples that are augmented at random."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        tokens = torch.randint(9, (5,)) + random.randrange(9)
        return {"input_ids": tokens, "labels": torch.tensor(index % 2)}


class Once(IterableDataset):
    """A stream that can be read only once."""

    def __init__(self):
        self.rows = iter([Rows()[n] for n in range(10)])

    def __iter__(self):
        yield from self.rows


class Batched(Trainer):
    """Its data are batches already."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=None))


def trainer(model, folder, data, callbacks, cls=Trainer, **options):
    keys = {"report_to": "none", "use_cpu": True, "max_steps": 1, "learning_rate": 0.0, "disable_tqdm": True}
    arguments = TrainingArguments(folder, **keys | {"per_device_train_batch_size": 4} | options)
    return cls(model, arguments, train_dataset=data, callbacks=callbacks)


def bert(init="gradient"):
    base = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    config = FloraConfig(r=2, target_modules=["query"], init=init, modules_to_save=["classifier"])
    return get_peft_model(base, config)


@every_start
def test_the_trainer_callback_starts_the_adapter(init, tmp_path):
    model = bert(init)
    space = layers(model)[0].space("default")
    before = space.factors[1].clone()
    trainer(model, tmp_path, Rows(), [flora.Initialize(batches=2)]).train()
    assert space.started and not torch.allclose(space.factors[1], before)


def test_the_callback_does_not_change_the_data_of_the_training(tmp_path):
    class Recorded(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen[-1].append(inputs["input_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    seen = []
    for callbacks in ([], [flora.Initialize(batches=2)]):
        seen.append([])
        model = bert("factor")
        random.seed(0)
        trainer(model, tmp_path, Rows(), callbacks, Recorded, max_steps=3).train()
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize(
    ("data", "cls", "options", "sizes"),
    [
        (Rows(), Trainer, {}, {4, 2}),
        (Rows(), Trainer, {"dataloader_drop_last": True}, {4}),
        ([{"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": torch.tensor([0, 1, 1])}], Batched, {}, {3}),
    ],
)
def test_the_callback_takes_batches_as_the_training_does(data, cls, options, sizes, tmp_path):
    seen = []

    def loss(model, batch):
        seen.append(len(batch["labels"]))
        return model(**batch).loss

    trainer(bert(), tmp_path, data, [flora.Initialize(loss=loss)], cls, **options).train()
    assert set(seen) == sizes


def test_a_stream_that_the_callback_has_read_is_not_trained_on(tmp_path):
    with pytest.raises(ValueError, match="a stream that can be read only once.*leave out the callback"):
        trainer(bert(), tmp_path, Once(), [flora.Initialize()]).train()


def test_a_second_training_is_told_to_leave_out_the_callback(tmp_path):
    model = bert()
    own = trainer(model, tmp_path, Rows(), [flora.Initialize(batches=1)], learning_rate=0.1)
    own.train()
    with pytest.raises(ValueError, match="has been trained.*To train on, leave out.*callback flora.Initialize"):
        own.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batches": 0}, "batches is 0"), ({"batches": "x"}, "batches is 'x'"), ({"losss": 1}, "argument 'losss'")],
)
def test_the_callback_refuses_its_arguments_at_once(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        flora.Initialize(**options)


# --------------------------------------------------------------------------------------------------- what is refused


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


def refused(init, message, batches, loss=None, adapter="default", **options):
    """``initialize`` raises this, and leaves everything as it was."""
    model = without_loss(init)
    before, counts = {k: v.clone() for k, v in model.state_dict().items()}, hooks(model)
    with pytest.raises(ValueError, match=message):
        flora.initialize(model, batches, adapter, loss, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tucker" not in n)
    assert not layers(model)[0].space("default").started and hooks(model) == counts


X = torch.ones(2, 4)
NAN = torch.full((2, 4), torch.nan)


@pytest.mark.parametrize(
    ("message", "batches", "options"),
    [
        (r"^batches is 5, of type int: expected a list of batches.*flora.Initialize$", 5, {}),
        (r"^batches is None: expected a list of batches", None, {}),
        (r"^batches is 'ab', of type str: expected a list of batches", "ab", {}),
        (r"^batches is a dict, one batch: expected a list of batches$", {"input": X}, {}),
        (r"^batches is a Tensor, one batch", X, {}),
        (r"^batches is a tuple, one batch", (X, [0, 1]), {}),
        (r"^loss is a float: expected a function", [X], {"loss": 0.5}),
        (r"^warmup_steps is -1: expected a whole number", [X], {"warmup_steps": -1}),
        (r"^warmup_rate is nan: expected a number", [X], {"warmup_rate": math.nan}),
    ],
)
@every_start
def test_one_sentence_says_what_is_accepted(init, message, batches, options):
    refused(init, message, batches, **{"loss": lambda model, x: model(x).logits.sum()} | options)


@pytest.mark.parametrize(
    ("message", "batches", "loss"),
    [
        (r"is a float: expected a tensor with one number$", [X], lambda logits: 0.5),
        (r"is None: expected", [X], lambda logits: None),
        (r"is a tuple: expected", [X], lambda logits: (logits.sum(), logits)),
        (r"is a Tensor of shape \[2, 3\]: expected", [X], lambda logits: logits),
        (r"is nan, not finite: batches\[1\]; .* is that of layer '0', whose input is not finite", [X, NAN], torch.sum),
        (r"is -?inf, not finite: batches\[0\]; the output of every layer is finite", [X], lambda y: y.sum() / 0),
    ],
)
def test_what_a_loss_returns_must_be_one_finite_number(message, batches, loss):
    refused("gradient", message, batches, lambda model, x: loss(model(x).logits))


def test_a_warm_up_that_explodes_is_named():
    with pytest.raises(ValueError, match=r"warmup_rate"):
        flora.initialize(headed(), pairs(), loss=cross_entropy, warmup_rate=1e30)


def test_a_start_that_the_data_leave_random_is_said():
    with pytest.warns(UserWarning, match="start at random, because the gradient is zero: '0'"):
        flora.initialize(without_loss("gradient"), [X], loss=lambda model, x: 0 * model(x).logits.sum())


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
