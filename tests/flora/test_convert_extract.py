"""Extraction and rounding: ranks against exhaustive search, adapters against the checkpoints they stand for."""

from __future__ import annotations

import copy
import functools
import heapq
import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from cases import Experts
from flora import FloraConfig, tucker
from flora.convert import compress, extract
from flora.convert.fronts import _hull, front_of, lora_energy, spend
from flora.ranks import parameter_count
from reference import layers

# ----------------------------------------------------------------------------------------------------- ranks


def decaying(shape, seed=0, power=1.0):
    """A tensor whose singular values fall in every mode."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    for mode, size in enumerate(shape):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        tensor = tucker.mode_product(tensor, basis * torch.arange(1, size + 1) ** -power, mode)
    return tensor


def all_ranks(shape):
    return itertools.product(*(range(1, size + 1) for size in shape))


SHAPES = [(5,), (4, 6), (6, 1, 4), (1, 1), (4, 3, 3), (3, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_front_is_the_best_truncation_at_every_cost(shape):
    tensor = decaying(shape)
    front = front_of(tensor)
    total = tensor.square().sum().item()
    assert front.total == pytest.approx(total)
    energies = dict(zip(map(tuple, front.ranks.tolist()), front.energies.tolist(), strict=True))
    costs = front.parameters.tolist()
    for mode, values in enumerate(front.spectra):
        exact = torch.linalg.svdvals(tucker.unfold(tensor, mode))[: len(values)].tolist()
        assert values == pytest.approx(exact, abs=1e-7)
    for ranks in all_ranks(shape):
        energy = tucker.hosvd(tensor, ranks)[0].square().sum().item()
        cost = parameter_count(shape, ranks)
        assert max([e for e, c in zip(energies.values(), costs, strict=True) if c <= cost]) >= energy - 1e-10
        if ranks in energies:
            assert cost in costs and energies[ranks] == pytest.approx(energy)
        tails = [sum(s**2 for s in values[rank:]) for values, rank in zip(front.spectra, ranks, strict=True)]
        assert max(tails) - 1e-10 <= total - energy <= sum(tails) + 1e-10
    for share in (0.3, 0.8, 1.0):
        ranks = front.keeping(share)
        assert energies[ranks] >= share * total * (1 - 1e-14)
        cheaper = [e for r, e in energies.items() if parameter_count(shape, r) < parameter_count(shape, ranks)]
        assert all(energy < share * total for energy in cheaper)


def search(fronts, budget):
    """The most energy that any choice of points within the budget keeps."""
    points = [[(0, 0.0), *zip(f.parameters.tolist(), f.energies.tolist(), strict=True)] for f in fronts]
    return max(
        sum(e for _, e in choice) for choice in itertools.product(*points) if sum(c for c, _ in choice) <= budget
    )


def spent(fronts, ranks):
    """(parameters, energy) of a choice."""
    chosen = [
        (f.parameters[i].item(), f.energies[i].item())
        for f, r in zip(fronts, ranks, strict=True)
        if r
        for i in [f.ranks.tolist().index(list(r))]
    ]
    return tuple(map(sum, zip(*chosen, strict=True)))


@pytest.mark.parametrize("power", [0.3, 1.5])
def test_a_budget_is_spent_as_exhaustive_search_would(power):
    fronts = [front_of(decaying(shape, n, power)) for n, shape in enumerate([(4, 3, 3), (5, 4), (3, 2, 2)])]
    edges = [list(_hull(n, [0, *f.parameters.tolist()], [0.0, *f.energies.tolist()])) for n, f in enumerate(fronts)]
    assert all(slopes == sorted(slopes, reverse=True) for slopes in edges)
    ends, missed = [0] * len(fronts), []
    for _, n, end in heapq.merge(*edges, reverse=True):  # as far as this goes it is the optimum
        ends[n] = end
        costs = [0 if not e else f.parameters[e - 1].item() for e, f in zip(ends, fronts, strict=True)]
        assert spent(fronts, spend(fronts, sum(costs)))[1] == pytest.approx(search(fronts, sum(costs)))
    for budget in range(min(f.parameters[0].item() for f in fronts), sum(costs), 7):
        cost, energy = spent(fronts, spend(fronts, budget))
        assert cost <= budget
        missed.append(1 - energy / search(fronts, budget))
    assert max(missed) < 0.25 and sum(missed) / len(missed) < 0.02


@functools.cache
def example_front(shape, seed, power=1.0):
    return front_of(decaying(shape, seed, power))


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.integers(1, 300), st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_budget_is_passed_and_nothing_more_fits(shapes, budget, each):
    fronts = [example_front(shape, n) for n, shape in enumerate(shapes)]
    least = [parameter_count(shape, [1] * len(shape)) for shape in shapes]
    lowest = sum(least) if each else min(least)
    if lowest > budget:
        with pytest.raises(ValueError, match=f"too small for these weights: least possible {lowest}"):
            spend(fronts, budget, each)
        return
    ranks = spend(fronts, budget, each)
    costs = [parameter_count(shape, r) if r else 0 for shape, r in zip(shapes, ranks, strict=True)]
    assert sum(costs) <= budget and all(ranks if each else [True])
    for front, cost in zip(fronts, costs, strict=True):
        larger = [c for c in front.parameters.tolist() if c > cost]
        assert not larger or sum(costs) - cost + min(larger) > budget


def test_lora_s_energy_is_that_of_the_singular_values_it_can_pay_for():
    assert lora_energy([[3.0, 2.0], [4.0, 1.0]], [5, 10], 20) == 9 + 16 + 4
    assert lora_energy([[3.0, 2.0], [4.0, 1.0]], [5, 10], 14) == 9 + 4


# ------------------------------------------------------------------------------------------- one model of many layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.linear(x))


class Net(nn.Module):
    """A layer of every kind, a norm with buffers, and names that are the ends of others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.bn = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.block = Block()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.experts = Experts(3, 6, 5)
        self.embed = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.bn(self.up(self.depthwise(self.conv(x)))).flatten(2).mT
        x = self.block(self.attention(x, x, x)[0].mean(1))
        return self.head(self.norm(self.experts(self.linear(x))) + self.embed(torch.arange(len(x))))


X = torch.randn(2, 3, 4, 4, dtype=torch.float64)


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double().eval()


@torch.no_grad()
def moved(model, names=".*", power=1.0):
    """A copy with a decaying difference in its parameters and float buffers of these names."""
    model, seen = copy.deepcopy(model), set()
    for n, (name, tensor) in enumerate(model.state_dict().items()):
        if re.fullmatch(names, name) and tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            change = 0.1 * decaying(tuple(tensor.shape), n, power)
            tensor += change.abs() if "running_var" in name else change
    return model


def write(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(autouse=True)
def no_figure(request, monkeypatch):
    """Figures take longer than all else here."""
    if "figure" not in request.node.name:
        monkeypatch.setattr("flora.convert.figures.plot_spectra", lambda report, path: None)


@pytest.fixture
def files(tmp_path):
    """Paths of a base and a tuned checkpoint; of an adapter to be."""

    def make(tuned, base=None):
        base = net() if base is None else base
        return (
            write(base, tmp_path / "base.safetensors"),
            write(tuned, tmp_path / "tuned.safetensors"),
            tmp_path / "out",
        )

    return make


def loaded(folder, base=None):
    return PeftModel.from_pretrained(copy.deepcopy(net() if base is None else base), str(folder)).eval()


def check(folder, report, tuned, base=None, left_out=()):
    """Base and adapter are the tuned model: up to each row's error, exactly in all else."""
    before = (net() if base is None else base).state_dict()
    after = loaded(folder, base).merge_and_unload().state_dict()
    rows = {row.name: row for row in report.rows}
    for name, tensor in tuned.state_dict().items():
        row = rows.get(name.removesuffix(".weight")) or rows.get(name)
        if row:
            error = (after[name] - tensor).norm() / (tensor - before[name]).norm()
            assert error.item() == pytest.approx(row.error, abs=1e-9)
            assert row.norm == pytest.approx((tensor - before[name]).norm().item())
        else:
            expected = before[name] if name in left_out else tensor
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-12)


def test_all_that_changed_comes_back(files):
    tuned = moved(net())
    base_file, tuned_file, out = files(tuned)
    report = extract(base_file, tuned_file, out, model=net().to("meta"), energy=1.0)
    assert report.error < 1e-12 and report.rest.left_out == []
    assert {"norm", "block.norm", "bn"} == set(report.rest.layers)
    assert "linear.bias" in report.rest.vectors and "attention.in_proj_bias" in report.rest.vectors
    check(out, report, tuned)
    model = loaded(out)
    with torch.no_grad():
        torch.testing.assert_close(model(X), tuned(X))
        with model.disable_adapter():
            torch.testing.assert_close(model(X), net()(X))
    assert json.loads((out / "extraction.json").read_text())["parameters"] == report.parameters


def test_the_figure_is_drawn(files):
    base_file, tuned_file, out = files(moved(net()))
    extract(base_file, tuned_file, out, model=net(), budget=600)
    assert (out / "spectra.png").stat().st_size > 10_000


LOW_RANK = {
    "linear.weight": (2, 2),
    "conv.weight": (2, 2, 2, 1),
    "depthwise.weight": (2, 1, 2, 2),
    "up.weight": (1, 2, 2, 1),
    "experts.up": (2, 3, 2),
    "embed.weight": (3, 3),
    "attention.in_proj_weight": (2, 2),
}


@pytest.mark.parametrize("size", [{"energy": 1.0}, {"budget": 1.0}], ids=str)
def test_what_is_of_low_rank_is_found_at_its_ranks(files, size):
    base = net()
    tuned = copy.deepcopy(base)
    for name, ranks in LOW_RANK.items():
        weight = tuned.get_parameter(name).data
        factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(weight.shape, ranks, strict=True)]
        weight += tucker.reconstruct(torch.randn(ranks, dtype=torch.float64), factors)
    base_file, tuned_file, out = files(tuned)
    report = extract(base_file, tuned_file, out, model=base, **size)
    assert {row.name: row.ranks for row in report.rows} == {k.removesuffix(".weight"): r for k, r in LOW_RANK.items()}
    assert report.error < 1e-10 and report.rest is None
    check(out, report, tuned)


@settings(deadline=None, max_examples=10)
@given(st.one_of(st.integers(30, 400), st.floats(0.05, 1.0)))
def test_a_budget_holds_and_the_report_is_true(tmp_path_factory, budget):
    folder, tuned = tmp_path_factory.mktemp("budget"), moved(net(), "(conv|linear|experts|norm).*")
    paths = write(net(), folder / "base.safetensors"), write(tuned, folder / "tuned.safetensors")
    report = extract(*paths, folder / "out", model=net(), budget=budget)
    limit = budget if isinstance(budget, int) else int(budget * sum(p.numel() for p in net().parameters()))
    spaces = {layer.name: layer.tucker_space["default"] for layer in layers(loaded(folder / "out"))}
    written = {row.name: sum(p.numel() for p in spaces[row.name].parameters()) for row in report.rows if row.ranks}
    assert sum(written.values()) == report.parameters <= limit
    assert 0 <= report.lora_error <= 1 and report.energy == pytest.approx(1 - report.error**2)
    check(folder / "out", report, tuned)


def test_energy_is_kept_in_every_weight_and_costs_more_the_more(files):
    base_file, tuned_file, out = files(moved(net()))
    last = 0
    for energy in (0.2, 0.5, 0.9, 0.999, 1.0):
        report = extract(base_file, tuned_file, out.with_name(f"{energy}"), model=net(), energy=energy)
        assert all(row.energy >= energy - 1e-12 for row in report.rows)
        assert report.parameters > last
        last = report.parameters


def test_ranks_may_be_given(files):
    base_file, tuned_file, out = files(moved(net()))
    report = extract(base_file, tuned_file, out, model=net(), rank=3)
    ranks = {row.name: row.ranks for row in report.rows}
    # never above the mode's size or the other ranks' product; a kernel's as FloraConfig gives them
    assert ranks["linear"] == (3, 3) and ranks["conv"] == (3, 3, 2, 2) and ranks["up"] == (3, 3, 1, 1)
    check(out, report, moved(net()))


def test_hooi_s_error_is_the_report_s(files):
    base, tuned = net(), moved(net(), "conv.weight", power=0.1)
    base_file, tuned_file, out = files(tuned)
    (row,) = extract(base_file, tuned_file, out, model=base, rank=[2, 1, 2, 1]).rows
    difference = tuned.conv.weight.data - base.conv.weight.data
    hooi = difference - tucker.reconstruct(*tucker.hooi(difference, row.ranks))
    assert row.error == pytest.approx((hooi.norm() / difference.norm()).item())


def test_the_rest_can_be_left_out(files):
    tuned = moved(net())
    base_file, tuned_file, out = files(tuned)
    report = extract(base_file, tuned_file, out, model=net(), energy=0.9, keep_rest=False)
    assert {"norm.weight", "linear.bias", "bn.running_mean"} < set(report.rest.left_out)
    assert report.rest.left_share > 0 and report.rest.parameters == 0 and "left out: " in str(report)
    check(out, report, tuned, left_out=report.rest.left_out)


def test_names_that_end_like_others_mean_only_themselves(files):
    """PEFT takes "linear" for "block.linear", too, and "norm" for "block.norm"."""
    tuned = moved(net(), "(linear|norm).*")
    base_file, tuned_file, out = files(tuned)
    report = extract(base_file, tuned_file, out, model=net(), energy=1.0)
    assert [row.name for row in report.rows] == ["linear"]
    assert report.rest.layers == ["block.norm", "norm"] and report.rest.vectors == ["linear.bias"]
    check(out, report, tuned)


class Table(nn.Module):
    """A parameter of its own beside layers, as a ViT's embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.randn(1, 4))


def test_what_peft_can_not_hold_is_named(files):
    base = Table().double()
    tuned = moved(base)
    report = extract(*files(tuned, base), model=base, energy=1.0)
    assert report.rest.left_out == ["token"] and "left out: 1 (token)" in str(report)
    check(files(tuned, base)[2], report, tuned, base, left_out=["token"])


def test_a_parameter_beside_layers_is_kept(files):
    base = nn.Sequential(Table(), nn.Linear(4, 4)).double()
    tuned = moved(base)
    report = extract(*files(tuned, base), model=base, energy=1.0)
    assert report.rest.left_out == [] and "0.token" in report.rest.vectors
    check(files(tuned, base)[2], report, tuned, base)


# ---------------------------------------------------------------------------------------------------- transformers


SMALL = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def convnext(labels=3):
    config = ConvNextV2Config(
        num_stages=2, hidden_sizes=[4, 6], depths=[1, 1], num_labels=labels, image_size=8, patch_size=2
    )
    return ConvNextV2ForImageClassification(config)


def llama(tied=False):
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def experts():
    """Stacked in the model, and a file's tensor each."""
    config = Qwen3MoeConfig(**SMALL, head_dim=4, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=6)
    return Qwen3MoeForCausalLM(config)


def vit():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


MODELS = {"convnext": convnext, "llama": llama, "tied": lambda: llama(tied=True), "experts": experts, "vit": vit}


# PEFT's of tied weights: both copies are saved, and are the same
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("size", [{"energy": 1.0}, {"budget": 0.3}], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_transformers_models(make, size, tmp_path):
    torch.manual_seed(0)
    base = make().double().eval()
    tuned = moved(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", **size)
    assert report.rest.left_out == []
    check(tmp_path / "out", report, tuned, base)
    if size == {"energy": 1.0}:
        assert report.error < 1e-12


def test_a_new_head_is_taken_whole(tmp_path):
    torch.manual_seed(0)
    base, tuned = convnext().double(), convnext(labels=5).double()
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"'classifier.weight' has shape \[5, 6\], but \[3, 6\] in the model"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", model=base, energy=1.0)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", energy=1.0)
    assert "classifier" in report.rest.layers
    onto = convnext(labels=5).double()
    onto.convnextv2.load_state_dict(base.convnextv2.state_dict())
    merged = loaded(tmp_path / "out", onto).merge_and_unload().state_dict()
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- what is refused

GOOD = {"energy": 0.9}
BAD = {
    "no size": ({}, {}, "exactly one of budget, energy and rank is needed, got none"),
    "two sizes": ({"budget": 5, "energy": 0.5}, {}, "exactly one of budget, energy and rank is needed, got {'budget'"),
    "budget": ({"budget": 1.5}, {}, "budget must be a number of parameters"),
    "budget too small": ({"budget": 5}, {}, "a budget of 5 parameters is too small .* least possible 12"),
    "energy": ({"energy": 0}, {}, r"energy must be a number in \(0, 1\], got 0"),
    "rank": ({"rank": 0}, {}, "rank must be a whole number from 1"),
    "ranks": ({"rank": [2, 2]}, {}, r"layer 'conv': 2 ranks \[2, 2\] for a weight of 4 modes"),
    "shape": (GOOD, {"linear.weight": torch.zeros(6, 5)}, r"'linear.weight' has shape \[6, 5\], but \[6, 6\] in"),
    "integers": (GOOD, {"linear.weight": torch.zeros(6, 6, dtype=torch.int8)}, "has dtype torch.int8; a float"),
    "missing": (GOOD, {"linear.weight": None}, "tuned.safetensors has no weight 'linear.weight', which is"),
    "unknown": (GOOD, {"other.weight": torch.zeros(2, 2)}, "'other.weight' is not a weight of the model, a Net"),
    "not finite": (GOOD, {"linear.weight": torch.full((6, 6), torch.nan)}, "'linear.weight': the .* not finite"),
    "the same": (GOOD, net().state_dict(), "no weight of two or more modes differs, they are the same"),
    "vectors": (GOOD, {**net().state_dict(), "linear.bias": torch.ones(6)}, "only 1 others, such as 'linear.bias'"),
}  # fmt: skip


@pytest.mark.parametrize(("size", "changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_is_written(size, changes, message, files, tmp_path):
    base_file, tuned_file, out = files(moved(net()))
    state = {**moved(net()).state_dict(), **changes}
    save_file({name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}, tuned_file)
    with pytest.raises(ValueError, match=message):
        extract(base_file, tuned_file, out, model=net(), **size)
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}


def test_a_model_is_needed_where_no_config_tells(files):
    with pytest.raises(ValueError, match="give model=, the structure that the adapter will be loaded onto"):
        extract(*files(moved(net())), energy=0.9)


# ------------------------------------------------------------------------------------------------ adapters made smaller


def adapter(folder, **options):
    config = {"r": 4, "target_modules": ["conv", "up", "linear", "attention"], "target_parameters": ["experts.up"]}
    torch.manual_seed(1)
    model = get_peft_model(net(), FloraConfig(**{**config, "init_weights": False, **options})).eval()
    model.save_pretrained(str(folder))
    return model


def deltas(model, name="default"):
    return {layer.name: layer.get_delta_weight(name) for layer in layers(model) if name in layer.tucker_space}


@pytest.mark.parametrize(
    "size", [{"energy": 1.0}, {"energy": 0.7}, {"budget": 300}, {"budget": 0.5}, {"rank": 2}], ids=str
)
def test_rounding_is_the_truncation_of_the_whole_update(size, tmp_path):
    model = adapter(tmp_path / "large", modules_to_save=["head"], scale=3.0)
    report = compress(tmp_path / "large", tmp_path / "small", **size)
    small = loaded(tmp_path / "small")
    before, after = deltas(model), deltas(small)
    assert {row.name for row in report.rows} == set(before) == set(after)
    for row in report.rows:
        delta = before[row.name]
        error = (delta - after[row.name]).norm() / delta.norm()
        whole = delta - tucker.reconstruct(*tucker.truncate(delta, row.ranks))
        assert error.item() == pytest.approx(row.error, abs=1e-9)
        assert error.item() == pytest.approx((whole.norm() / delta.norm()).item(), rel=1e-3, abs=1e-9)
    count = sum(p.numel() for layer in layers(model) for p in layer.tucker_space.parameters())
    budget = size.get("budget", count)
    assert report.parameters <= (budget if isinstance(budget, int) else budget * count)
    if size == {"energy": 1.0}:
        assert report.error < 1e-10
        with torch.no_grad():
            torch.testing.assert_close(small(X), model(X))
    assert all(layer.tucker_space["default"].scale == 3.0 for layer in layers(small))
    assert small.peft_config["default"].modules_to_save == ["head"]
    assert json.loads((tmp_path / "small" / "compression.json").read_text())["error"] == report.error


def test_an_update_that_is_zero_stays_so(tmp_path):
    adapter(tmp_path / "fresh", init_weights=True)
    report = compress(tmp_path / "fresh", tmp_path / "small", energy=0.9)
    assert report.error == 0 and all(set(row.ranks) == {1} for row in report.rows)
    assert all(not delta.any() for delta in deltas(loaded(tmp_path / "small")).values())


def test_rounding_refuses_bad_sizes(tmp_path):
    adapter(tmp_path / "large")
    for size, message in [
        ({}, "exactly one of"),
        ({"budget": 20}, "too small"),
        ({"rank": [2, 2]}, "2 ranks .* modes"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(tmp_path / "large", tmp_path / "small", **size)
    with pytest.raises(ValueError, match="has no adapter in it: there is no adapter_config.json"):
        compress(tmp_path, tmp_path / "small", rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


# -------------------------------------------------------------------------------------------------------- weighted sums


def two_adapters(**options):
    config = {"r": 2, "target_modules": ["conv", "linear"], "init_weights": False, "kernel_rank": 3, **options}
    model = get_peft_model(net(), FloraConfig(**config)).eval()
    model.add_adapter("other", FloraConfig(**{**config, "r": 3}))
    linear = {name: 0.5 * d - 2 * deltas(model, "other")[name] for name, d in deltas(model).items()}
    return model, linear


def test_a_weighted_sum_is_exact_at_full_svd_rank():
    model, linear = two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "svd", svd_rank=8)
    for name, delta in deltas(model, "sum").items():
        torch.testing.assert_close(delta, linear[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("svd_rank", [None, 1])
def test_a_weighted_sum_is_rounded_as_hooi_rounds_it(svd_rank):
    model, linear = two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "svd", svd_rank=svd_rank)
    rank = svd_rank or 2
    for layer in layers(model):
        ranks = (rank, rank, 3, 3)[: len(layer.weight_shape)]
        assert layer.tucker_space["sum"].ranks == ranks
        whole = linear[layer.name] - tucker.reconstruct(*tucker.hooi(linear[layer.name], ranks))
        error = linear[layer.name] - layer.get_delta_weight("sum")
        assert error.norm().item() == pytest.approx(whole.norm().item(), rel=1e-3)


def test_weighted_sums_refuse_bad_ranks():
    model, _ = two_adapters()
    for options, message in [
        (("ties",), "combination_type must be one of linear, cat, svd, got 'ties'"),
        (("linear", 2), "svd_rank=2 is for combination_type='svd', got 'linear'"),
        (("svd", 0), "svd_rank must be a whole number from 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", *options)
    assert "sum" not in model.peft_config
