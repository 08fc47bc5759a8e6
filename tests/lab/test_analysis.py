"""What is measured against dense algebra, what is chosen and tested against scipy, and what is drawn of which rows."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import math
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ttest_1samp, ttest_rel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import flora_lab
from flora import FloraConfig
from flora_lab.analysis import across, analyse, fields, figures, measure, tables
from flora_lab.analysis.drawing import Picture, apart, canvas
from flora_lab.analysis.measure import Norms, amplification, deltas, spectra
from flora_lab.analysis.results import chosen, left_out, summarise
from flora_lab.analysis.rows import read
from flora_lab.analysis.style import PALETTE, label, styles
from flora_lab.methods import METHODS, adapt

# ------------------------------------------------------------------------------------------------------- measured


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1)
        self.linear = nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.linear(torch.tanh(self.conv(x)).mean((2, 3)))))


class Flat(Net):
    """Net without its convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Identity()
        self.linear = nn.Linear(4, 16)


def adapted(method: str) -> tuple[Net, nn.Module]:
    """The model before, and after something has been learned."""
    before = Flat() if method in ("gralora", "oft") else Net()
    model = adapt(method, copy.deepcopy(before), ["head"], 400, {}).model
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "head" not in name and not (name.endswith("bias") and method == "full"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return before, model


UPDATING = [method for method in METHODS if method not in ("head", "bitfit", "houlsby", "pfeiffer")]


@pytest.mark.parametrize("method", UPDATING)
def test_the_base_model_with_the_deltas_computes_what_the_adapted_model_computes(method):
    before, model = adapted(method)
    base = {name: p.detach().clone() for name, p in before.named_parameters() if "head" not in name}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = deltas(model, base if METHODS[method].changes_base else None)
    linear = ("pissa", "olora", "orthogonal", "eva", "lora_ga", "corda", "miss", "gralora", "oft")
    assert found.keys() == ({"linear.weight"} if method in linear else {"conv.weight", "linear.weight"})
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for name, delta in found.items():
        before.get_parameter(name).data += delta.float()
    x = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(model.eval()(x), before(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(UPDATING)))
def test_what_updates_no_weight_has_no_deltas(method):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(**size, vocab_size=9))
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "classifier" not in name}
    model = adapt(method, model, ["classifier"], 400, {}).model
    assert deltas(model, base) == spectra(model, base) == {}


def test_deltas_of_raw_parameters_and_packed_attention():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "experts": nn.Module()})
    for name, shape in {"up": (3, 5, 6), "down": (3, 6, 5)}.items():
        net["experts"].register_parameter(name, nn.Parameter(torch.randn(shape)))
    both = {"target_modules": ["attention"], "target_parameters": ["experts.up", "experts.down"]}
    names = {"attention.in_proj_weight", "attention.out_proj.weight", "experts.up", "experts.down"}
    for config in (FloraConfig(r=2, init="official", **both), peft.LoraConfig(r=2, init_lora_weights=False, **both)):
        model = peft.get_peft_model(copy.deepcopy(net), config)
        if isinstance(config, FloraConfig):
            for parameter in model.parameters():
                parameter.data += 0.1 * parameter.requires_grad
        found = deltas(model)
        assert found.keys() == names
        merged = model.merge_and_unload()
        for name, delta in found.items():
            module, _, leaf = name.rpartition(".")
            now, was = (getattr(m.get_submodule(module), leaf) for m in (merged, net))
            torch.testing.assert_close(delta.float(), now - was, rtol=1e-3, atol=1e-6)


def test_a_merged_adapter_is_refused():
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["linear"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="layer 'linear' is merged: unmerge it"):
        deltas(model)


SHAPES = [(9, 7, 3), (7, 30, 7), (300, 400, 5), (300, 280, 200), (1, 6, 1)]


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_amplification_of_a_matrix_is_the_papers(rows, columns, rank):
    delta = torch.randn(rows, rank).double() @ torch.randn(rank, columns).double()
    weight = torch.randn(rows, columns).double()
    left, _, right = torch.linalg.svd(delta)
    paper = delta.norm() / (left[:, :rank].mT @ weight @ right[:rank].mT).norm()  # section 6.2.2
    assert amplification(delta, weight) == pytest.approx(paper.item(), rel=1e-6)
    assert amplification(delta.float(), weight.float()) == pytest.approx(paper.item(), rel=1e-4)


def test_amplification_of_any_order():
    shape, ranks = (6, 5, 3, 4), (2, 3, 2, 1)
    factors = [torch.randn(size, rank).double() for size, rank in zip(shape, ranks, strict=True)]
    delta = torch.einsum("abcd,ia,jb,kc,ld->ijkl", torch.randn(ranks).double(), *factors)
    weight = torch.randn(shape).double()
    bases = [torch.linalg.svd(delta.movedim(n, 0).flatten(1)).U[:, :rank] for n, rank in enumerate(ranks)]
    core = torch.einsum("ijkl,ia,jb,kc,ld->abcd", weight, *bases)
    assert amplification(delta, weight) == pytest.approx((delta.norm() / core.norm()).item(), rel=1e-6)
    assert amplification(3 * delta, weight) == pytest.approx(3 * amplification(delta, weight))
    assert amplification(weight, weight) == pytest.approx(1.0)
    assert amplification(0 * delta, weight) == 0 and amplification(delta, 0 * weight) == math.inf


def test_norms_follow_a_training():
    _, model = adapted("flora")
    norms, state = Norms(points=5), SimpleNamespace(max_steps=100, global_step=0, is_world_process_zero=True)
    norms.on_train_begin(None, state, None)
    for state.global_step in range(1, 91):
        norms.on_step_end(None, state, None, model=model)
    norms.on_train_end(None, state, None, model=model)
    norms.on_train_end(None, state, None, model=model)
    assert [row[0] for row in norms.records] == [1, 4, 16, 36, 64, 90]
    expected = [delta.norm().item() for delta in deltas(model).values()]
    assert norms.records[0][1] == pytest.approx(sum(expected) / len(expected)) and norms.seconds > 0
    with pytest.raises(ValueError, match="points=0"):
        Norms(0)


@pytest.mark.parametrize("method", ["flora", "dora", "locon"])
def test_a_training_that_diverged_is_no_error(method):
    _, model = adapted(method)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "linear" in name:
            parameter.data.fill_(math.nan)
    norms, state = Norms(), SimpleNamespace(global_step=1, is_world_process_zero=True)
    norms.on_train_end(None, state, None, model=model)
    assert math.isnan(norms.records[0][1]) and math.isfinite(norms.records[0][2])
    assert math.isnan(spectra(model)["delta"][0])


def test_spectra_of_updates_and_cores():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(40, 50)), FloraConfig(r=6, target_modules="all-linear"))
    model.base_model.model[0].tucker_space["default"].factor_0.data.normal_()
    found = spectra(model)
    (delta,) = deltas(model).values()
    values = torch.linalg.svdvals(delta)[:6]
    assert found["delta"] == pytest.approx((values / values[0]).tolist(), abs=1e-6)
    assert found["core"] == pytest.approx([1.0] * measure.POINTS)  # the start is orthogonal
    assert spectra(peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["conv"])))["delta"] == [0.0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_a_mean_spectrum_falls_as_each_of_its_spectra_does(ranks, draw):
    spectra = [0.9 ** torch.arange(rank, dtype=torch.float64) for rank in ranks]
    padded = [torch.cat([one, one.new_zeros(draw.randint(0, 5))]) for one in spectra]
    expected = [0.9**n for n in range(min(measure.POINTS, sorted(ranks)[len(ranks) // 2]))]
    assert measure._mean_spectrum(padded).tolist() == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).map(lambda v: torch.tensor(sorted(v, reverse=True))))
def test_quantiles_run_from_first_to_last(values):
    found = measure._quantiles(values)
    assert found[0] == values[0] and found[-1] == pytest.approx(values[-1].item()) and len(found) == measure.POINTS
    assert (found.diff() <= 1e-6).all()


# --------------------------------------------------------------------------------------------------------- chosen


def options_of(variant):
    """As the shipped jobs name their variants: flora-core, flora-0.4."""
    method, _, rest = variant.partition("-")
    number = rest.replace(".", "", 1).isdecimal()
    return method, {"scale": float(rest)} if number else {"init": rest} if rest else {}


def row(variant="lora", budget=1000, seed=0, rate=1e-3, value=0.5, test=None, job="task", **more):
    method, options = options_of(variant)
    return {
        "job": job, "metric": "accuracy", "variant": variant, "method": method, "options": options,
        "budget": budget, "seed": seed, "learning_rate": rate, "validation": {"accuracy": value},
        "test": {"accuracy": value if test is None else test}, "adapter_parameters": budget or 0,
        "head_parameters": 10, "model_parameters": 9999, "epochs": 4, "steps": 40, "seconds": 20.0, "memory": 2**28,
        "bytes": 4096, "notes": [], "curve": [[1, value / 2], [2, value]], "norms": [], "machine": "a machine", **more,
    }  # fmt: skip


def grid(variant="lora", budget=1000, best=1e-3, seeds=range(5), level=0.8, **more):
    """A variant's rows as a comparison makes them."""
    draw = random.Random(f"{variant}{budget}{more.get('job')}")
    trials = [(0, rate) for rate in (1e-4, 1e-3, 1e-2)] + [(seed, best) for seed in seeds if seed]
    return [
        row(variant, budget, seed, rate, level + draw.gauss(0, 0.01) - 0.1 * (rate != best), **more)
        for seed, rate in trials
    ]


def comparison(jobs=("cifar-shift", "cola", "camvid"), budgets=(10_000, 30_000, 100_000), seeds=range(5)):
    """As many rows as there can be: every method, and a scale sweep."""
    variants = [*METHODS, "flora-core", "flora-gradient"]
    rows = []
    for job, (n, variant) in itertools.product(jobs, enumerate(variants)):
        updates = variant.split("-")[0] in UPDATING
        more = {
            "notes": ["rank 4 on 55 layers"] if variant == "lora" else [],
            "curve": [[epoch, (0.6 + 0.02 * n) * (1 - math.exp(-epoch / 4))] for epoch in range(1, 21)],
            "norms": [[step, 0.01 * n * step**0.5, 0.02 * n * step**0.4] for step in (1, 4, 9, 16, 25)] * updates,
            "spectra": {"delta": [math.exp(-i / (n + 1)) for i in range(32)]} if updates else {},
        }
        if variant.startswith("flora"):
            more["spectra"]["core"] = [math.exp(-i / 20) for i in range(32)]
        for budget in budgets if METHODS[variant.split("-")[0]].size else [None]:
            size = {"full": 414_912, "head": 0, "bitfit": 2032}.get(variant, budget)
            place = len(variants) if variant == "full" else n
            level = 0.6 + 0.02 * place + 0.01 * budgets.index(budget or budgets[0])
            rows += grid(variant, budget, seeds=seeds, level=level, job=job, adapter_parameters=size, **more)
    for job, scale in itertools.product(jobs, (0.04, 0.4, 4)):
        rows += grid(f"flora-{scale:g}", budgets[0], seeds=seeds, level=0.8, job=job)
    return rows


def test_the_best_on_validation_is_chosen_the_lower_of_equals():
    rows = [row(rate=rate, value=value) for rate, value in ((1e-2, 0.7), (1e-3, 0.7), (1e-4, 0.6), (1e-1, math.nan))]
    rows += [row(seed=1, rate=1e-3), row(seed=2, rate=1e-2)]
    assert [(run["seed"], run["learning_rate"]) for run in chosen(rows)] == [(0, 1e-3), (1, 1e-3)]
    assert summarise(rows)[0].edge is None
    assert summarise([r for r in rows if r["learning_rate"] != 1e-4])[0].edge == "lowest"
    assert summarise([r for r in rows if r["learning_rate"] < 1e-2])[0].edge == "highest"


def test_the_best_mean_of_the_seeds_with_all_rates_is_chosen():
    values = {1e-2: (0.7, 0.5), 1e-3: (0.6, 0.7)}  # of seeds 0 and 1
    rows = [row(seed=seed, rate=rate, value=values[rate][seed]) for rate in values for seed in (0, 1)]
    rows += [row(seed=2, rate=1e-2, value=0.9)]
    assert [(run["seed"], run["learning_rate"]) for run in chosen(rows)] == [(0, 1e-3), (1, 1e-3)]


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_the_test_split_chooses_nothing(draw):
    rows = grid() + grid("flora") + grid("full", None)
    changed = [r | {"test": {"accuracy": draw.random()}} for r in rows]
    keys = ("variant", "budget", "seed", "learning_rate")
    assert [[r[key] for key in keys] for r in chosen(rows)] == [[r[key] for key in keys] for r in chosen(changed)]


def test_statistics_and_the_paired_test():
    rows = grid("flora", 1000) + grid("flora", 2000, level=0.9)
    rows += grid("lora", 2000, seeds=range(4)) + grid("full", None)
    found = {(result.variant, result.budget): result for result in summarise(rows)}
    mine, reference = found["lora", 2000], found["flora", 2000]
    values = torch.tensor(list(mine.values.values()), dtype=torch.float64)
    assert mine.mean == pytest.approx(values.mean()) and mine.std == pytest.approx(values.std())
    paired = [list(result.values.values())[:4] for result in (mine, reference)]
    assert mine.p == pytest.approx(ttest_rel(*paired).pvalue) and mine.gain < 0
    full = list(found["full", None].values.values())  # 2000 is the budget of most methods
    assert found["full", None].p == pytest.approx(ttest_rel(full, list(reference.values.values())).pvalue)
    assert reference.p is None


@pytest.mark.parametrize(
    "others",
    [
        [row(seed=0)],  # one seed in common
        [row(seed=seed, value=0.5 + 0.1 * seed) for seed in range(3)],  # no differences
        [row(seed=seed, value=0.4 + 0.1 * seed) for seed in range(3)],  # differences that do not differ
        [row(seed=seed, value=math.nan) for seed in range(3)],
        [row(seed=seed, budget=7) for seed in range(3)],  # FLoRA has no such budget
    ],
)
def test_no_test_where_there_is_none(others):
    ours = [row("flora", seed=seed, value=0.5 + 0.1 * seed) for seed in range(3)]
    (result,) = [result for result in summarise(ours + others) if result.method == "lora"]
    assert result.p is None and result.gain is None


def on_disk(line):
    return fields.to_disk(line) if isinstance(line, dict) else line


def write(path: Path, *lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(on_disk(line))) + "\n" for line in lines))
    return path


def test_rows_are_read_from_files_and_folders(tmp_path):
    file = write(tmp_path / "a" / "results.jsonl", row(value=0.1), row(seed=1), row(value=0.2), "")
    write(tmp_path / "b" / "c" / "results.jsonl", row(job="other"))
    rows = read([tmp_path])
    assert [(r["job"], r["seed"]) for r in rows] == [("task", 1), ("task", 0), ("other", 0)]
    assert rows[1]["test"] == {"accuracy": 0.2}  # of a trial that is there twice, the last row
    file.write_text(file.read_text() + '{"task": "ta')
    with pytest.warns(UserWarning, match=r"results.jsonl, line 5: cut short, left out"):
        assert len(read([file])) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: incomplete JSON"),
        ("[1]", "line 1: expected a JSON object, got a list"),
        ({"job": "t"}, "line 1: missing key 'metric'"),
        (
            {key: value for key, value in row().items() if key != "adapter_parameters"},
            "line 1: missing key 'adapter_parameters'",
        ),
        (row() | {"test": 0.5}, "line 1: test=0.5; expected an object with a number at 'accuracy'"),
        (row() | {"validation": {}}, "line 1: validation={}; expected an object with a number at 'accuracy'"),
        (row() | {"test": {"accuracy": "0.5"}}, "line 1: test={'accuracy': '0.5'}; expected an object with a number"),
        (row() | {"validation": {"accuracy": None}}, "line 1: validation={'accuracy': None}; expected an object with"),
        (
            row() | {"metric": "f", "validation": {"f": 1}, "test": {"f": 1}},
            "line 2: metric='accuracy' for task 'task'",
        ),
    ],
)
def test_what_is_no_row_is_named(tmp_path, line, message):
    file = write(tmp_path / "results.jsonl", line, row(seed=1))
    with pytest.raises(ValueError, match=re.escape(f"{file}, {message}")):
        read([file])


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("job", (None, 7), "a string"),
        ("metric", (["a"],), "a string"),
        ("left_out", (None,), "a string"),
        ("seed", (None, 0.5, True), "a whole number"),
        ("adapter_parameters", ("9",), "a whole number"),
        ("budget", ("500", 0.5), "a whole number or null"),
        ("learning_rate", (None, "1e-3", 0, math.nan, math.inf), "a number above 0"),
        ("seconds", ("1",), "a number"),
        ("options", ([],), "an object"),
        ("notes", ("rank 2", [2]), "a list of strings"),
        ("curve", ("x", [1], [[1]], [[1, "x"]]), "a list of pairs of numbers"),
        ("norms", ([1], [[1, 2]]), "a list of three numbers each"),
        ("spectra", ([], {"delta": 1.0}, {"core": [None]}), "an object of lists of numbers"),
    ],
)
def test_a_value_that_is_not_accepted_is_named(tmp_path, key, values, expected):
    for value in values:
        file = write(tmp_path / "results.jsonl", row(seed=1), row() | {key: value})
        with pytest.raises(
            ValueError, match=re.escape(f"{file}, line 2: {fields.on_disk(key)}={value!r}; expected {expected}") + "$"
        ):
            read([file])


def test_what_is_needed_is_enough(tmp_path):
    needed = {key: row()[key] for key in (*fields.SUBJECT, *fields.OUTCOME)}
    rows = [needed | dict.fromkeys(("seconds", "memory", "curve", "norms", "spectra", "options", "notes")), needed]
    analyse([write(tmp_path / "results.jsonl", *rows, needed | {"variant": "flora", "budget": 7})], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "one", "two", "of"),
    [
        ("settings", "5f3a", "90c1", "task 'cola'"),
        ("options", {}, {"r": 4}, "task 'cola', method 'lora'"),
        ("method", "lora", "dora", "task 'cola', method 'lora'"),
    ],
)
def test_rows_that_contradict_each_other_are_named(tmp_path, key, one, two, of):
    mine = write(tmp_path / "glue" / "cola" / "results.jsonl", row(job="cola", seed=1), row(job="cola") | {key: one})
    other = write(tmp_path / "quick" / "cola" / "results.jsonl", row("flora", job="cola"), row(job="cola") | {key: two})
    line = f"{other}, line 2: {fields.on_disk(key)}={two!r} for {of}, but {one!r} in {mine}, line "
    with pytest.raises(ValueError, match=re.escape(line) + ".*analyse them separately, or rename one output"):
        read([tmp_path])
    write(other, row("flora", job="cola", settings=None), row(job="other") | {key: two})
    assert len(read([tmp_path])) == 4


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no results.jsonl in or below it"):
        read([tmp_path])
    with pytest.raises(ValueError, match="no such file"):
        read([tmp_path / "results.jsonl"])
    with pytest.raises(ValueError, match=r"no rows in .*results.jsonl"):
        read([write(tmp_path / "results.jsonl")])


# --------------------------------------------------------------------------------------------------------- tables


def test_a_comparison_as_a_table():
    rows = grid("flora", level=0.9) + grid("lora", best=1e-2) + grid("full", None, level=0.95, memory=None)
    table = tables.comparison(summarise(rows))
    assert table.columns[:4] == ["method", "budget", "test accuracy × 100", "p vs FLoRA"]
    assert [line[0] for line in table.lines] == ["full fine-tuning", "LoRA", "FLoRA"]
    assert table.bold == {(2, 2)} and "**" in table.markdown().splitlines()[-1]
    assert table.lines[1][3:] == ["< 0.001 ▼", "1,000 + 10", "0.01 ↑", "5", "5", "256 MiB"]
    assert table.lines[0][-1] == "–" and "lowest or highest learning rate" in table.note
    assert len({len(line) for line in table.markdown().splitlines()}) == 1


FIVE = (0.5, 0.6, 0.7, 0.55, 0.65)


def level(variant, *values, budget=1000):
    return [row(variant, budget=budget, seed=seed, value=value) for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("rows", "bold"),
    [
        (level("lora", *FIVE) + level("flora", *[x + 0.1 + x / 99 for x in FIVE]), ["FLoRA"]),
        (level("lora", *FIVE) + level("flora", 0.8, 0.6, 0.7, 0.5, 0.61), ["LoRA", "FLoRA"]),
        (level("lora", *FIVE) + level("flora", *FIVE), ["LoRA", "FLoRA"]),
        (level("lora", *FIVE) + level("flora", *[x + 0.1 for x in FIVE]), ["FLoRA"]),
        (level("lora", *FIVE[:4]) + level("flora", *[x + 0.1 + x / 99 for x in FIVE[:4]]), []),  # four seeds
        (level("lora", *FIVE[:4]) + level("flora", *[x + 0.05 for x in FIVE]), ["FLoRA"]),
        (level("lora", *FIVE[:4], math.nan) + level("flora", *[x / 2 for x in FIVE]), ["FLoRA"]),
        (level("lora", *[math.nan] * 5), []),
        (level("full", *[x + 1 for x in FIVE], budget=None) + level("lora", *FIVE, budget=7), ["LoRA"]),
    ],
)
def test_bold_is_what_the_test_does_not_tell_from_the_best(rows, bold):
    table = tables.comparison(summarise(rows))
    assert [table.lines[line][0] for line, _ in sorted(table.bold)] == bold and "In bold the best" in table.note


def test_variants_stand_after_their_method_by_their_numbers():
    names = ["flora-4", "flora-13", "flora", "flora-0.4", "lora", "flora-core", "other"]
    expected = ["lora", "flora", "flora-core", "flora-0.4", "flora-4", "flora-13", "other"]
    found = styles(map(row, names)).values()
    assert [style.variant for style in sorted(found, key=lambda style: style.order)] == expected


def test_methods_that_were_tried_with_more_learning_rates_are_named():
    rows = grid("flora") + grid("dora") + grid("lora")
    assert "tried" not in tables.comparison(summarise(rows)).note
    rows += [row(budget=b, rate=rate) for b in (1000, 9) for rate in (3e-4, 3e-3, 3e-2)] + grid(budget=9)
    assert "Learning rates tried: 3, but 6 with LoRA." in tables.comparison(summarise(rows)).note


def test_time_and_memory_over_loras():
    rows = grid("lora") + grid("flora", seconds=30.0, memory=2**29) + grid("full", None, epoch_seconds=2.5)
    lines = {line[0]: line[1:] for line in tables.costs(summarise(rows)).lines}
    assert lines["FLoRA"] == ["1,000", "7.5", "1.50", "512 MiB", "2.00"]
    assert lines["full fine-tuning"][:3] == ["–", "2.5", "0.50"]


def test_what_else_was_measured_has_a_table_of_its_own():
    assert tables.further(summarise(grid("lora") + grid("flora"))) is None
    rows = [row(seed=seed, test=0.5) for seed in (0, 1)] + [row("flora")]
    for one, drift in zip(rows, (0.1, 0.3), strict=False):
        one["test"] |= {"loss": 1.0, "drift": drift}
    table = tables.further(summarise(rows))
    assert table.columns == ["method", "budget", "drift"]
    assert table.lines == [["LoRA", "1,000", "0.2"], ["FLoRA", "1,000", "–"]]


def test_what_was_left_out_is_said_once():
    reason = {"job": "task", "metric": "accuracy", "variant": "dora", "method": "dora", "left_out": "no room"}
    rows = [reason | {"budget": budget} for budget in (5, 5, 9)] + [row(budget=b, notes=["rank 2"]) for b in (5, 9)]
    assert len(left_out(rows)) == 2
    assert tables.remarks(rows) == [
        "task, DoRA, budget 5 / 9: left out: no room",
        "task, LoRA, budget 5 / 9: rank 2",
    ]
    assert left_out([*rows, row("dora", 5)]) == [rows[2]]
    assert tables.comparison(summarise(rows[:3])).lines == []


def test_values_that_are_no_shares_are_not_multiplied_and_what_diverged_is_said():
    rows = [row(value=-3.25), row("flora", value=12.5), row("dora", value=math.nan)]
    cells = {line[0]: line[2] for line in tables.comparison(summarise(rows)).lines}
    assert cells == {"LoRA": "-3.25", "FLoRA": "12.50", "DoRA": "diverged (1 of 1)"}


def test_labels_come_from_the_method_and_its_options():
    cases = [("flora", {}), ("flora", {"init": "core"}), ("flora", {"scale": 0.4}), ("lora", {"r": 8}), ("x-y", {})]
    expected = ["FLoRA", "FLoRA, core start", "FLoRA, scale=0.4", "LoRA, r=8", "x-y"]
    assert [label(*case) for case in cases] == expected
    assert set(METHODS) <= set(PALETTE) and len(set(PALETTE.values())) == len(PALETTE)


def lab(colour):
    """CIE L*a*b* of a colour "#rrggbb" (sRGB, D65)."""
    shares = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [
        sum(map(math.prod, zip(row, linear, strict=True))) / white
        for row, white in zip(rows, (0.9505, 1, 1.089), strict=True)
    ]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_methods_that_are_drawn_together_can_be_told_apart():
    together = ["full", "head", "bitfit", "houlsby", "pfeiffer", "lora", "dora", "adalora", "loha", "lokr", "locon"]
    together += ["flora", "flora-activations", "flora-gradient"]
    for one, other in itertools.combinations(together, 2):
        assert math.dist(lab(PALETTE[one][0]), lab(PALETTE[other][0])) > 20, (one, other)


def test_a_name_that_the_user_gave_shows_only_where_labels_would_be_equal():
    rows = [row("flora", method="lora"), row("mine", method="flora"), row("yours", method="flora", options={"r": 2})]
    found = [style.label for style in styles(rows).values()]
    assert found == ["LoRA", "FLoRA", "FLoRA, r=2"]
    rows += [row("lora"), row("slow", method="flora")]
    found = [style.label for style in styles(rows).values()]
    assert found == ["LoRA (flora)", "FLoRA (mine)", "FLoRA, r=2", "LoRA", "FLoRA (slow)"]


def test_the_reference_is_plain_flora_whatever_its_name():
    def tested(**others):
        rows = [line for name, more in others.items() for line in grid(name, **more)]
        return {result.variant: result.p for result in summarise(rows)}

    mine = {"method": "flora", "options": {}}
    found = tested(mine=mine, lora={}, flora={"method": "dora", "options": {}})
    assert found["mine"] is None and found["lora"] is not None and found["flora"] is not None
    found = tested(mine=mine, flora={}, lora={})
    assert found["flora"] is None and found["mine"] is not None
    assert set(tested(lora={}, mine={"method": "flora", "options": {"r": 2}}).values()) == {None}


# -------------------------------------------------------------------------------------------------------- figures


def names(rows) -> list[str]:
    return [picture.name for picture in figures.pictures(summarise(rows))]


def test_a_figure_is_made_of_what_was_recorded():
    assert names([row(curve=[])]) == []
    assert names(grid()) == []
    assert names(grid(curve=[[1, 0.5]]) + grid("full", None, curve=[[1, 0.5]])) == ["methods"]
    assert names(grid() + grid("full", None)) == ["methods", "curves"]
    assert names(grid(budget=10, curve=[]) + grid(budget=20, curve=[])) == ["methods", "budgets"]
    scales = [r for s in (0.4, 4) for r in grid(f"flora-{s}", curve=[])]
    assert names(scales) == ["scales"]
    assert names(grid(curve=[], norms=[[1, 0.5, 0.0], [2, 1.0, 3.0]])) == ["norms"]
    assert names(grid(curve=[], spectra={"delta": [1.0, 0.1, 0.0]})) == ["spectra"]
    levels = {"head": 0.2, "lora": 0.7, "flora": 0.8, "full": 0.9}
    three = [r for job in "abc" for name in levels for r in grid(name, job=job, level=levels[name], curve=[])]
    assert names(three) == ["methods"] * 3 + ["gains", "gain-dots"]
    without_ends = [r for name in ("lora", "flora") for r in grid(name, job="d", curve=[])]
    assert figures._gains(summarise(three + without_ends)) == figures._gains(summarise(three))
    assert names(without_ends) == ["methods"]
    assert names([row(value=math.nan), row("flora", value=math.nan)]) == []


def test_figures_go_into_a_page_together():
    rows = grid() + grid("flora") + grid("full", None)
    drawn = [picture.svg() for picture in figures.pictures(summarise(rows))]
    ids = [name for svg in drawn for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 10
    for svg in drawn:
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)} <= set(ids)
        assert "currentColor" in svg and "FLoRA</text>" in svg
        assert not re.search(r"https?://(?!www\.w3\.org/)", svg)
        ElementTree.fromstring(svg)


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), max_size=14), st.floats(0.01, 0.07))
def test_labels_stay_apart(heights, gap):
    placed = sorted(apart(heights, gap))
    assert all(above - below > 0.8 * gap for below, above in itertools.pairwise(placed))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)


def test_what_train_leaves(tmp_path):
    rows = [row("full", None, more=1) | {"loaded_difference": 0.0, "merged_difference": 1e-6}, row(notes=["rank 2"])]
    figures.trained(rows, "accuracy", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = tables.summary(rows).splitlines()
    assert lines[0].split(" | ")[1:] == ["test accuracy", "trainable: adapter + head", "seconds", "on disk |"]
    assert "50.0 %" in lines[2] and "4 KiB" in lines[2] and lines[-1] == "LoRA: rank 2"


def test_everything_is_written(tmp_path):
    file = write(tmp_path / "results.jsonl", *grid(job="a/b <i>"), *grid("flora", job="a/b <i>"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = analyse([file], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html" and "a/b &lt;i&gt;" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {
        "report.html", "table.md", "a-b-i--methods.png", "a-b-i--curves.png",
    }  # fmt: skip
    assert "| FLoRA" in (page.parent / "table.md").read_text()


def test_tables_are_replaced_in_a_page(tmp_path):
    file = write(tmp_path / "results.jsonl", *grid(), *grid("flora"))
    page = tmp_path / "page.md"
    page.write_text("# One\n\n<!-- task -->\n| old |\n| --- |\n\nText | with a bar.\n")
    for _ in range(2):
        analyse([file], tmp_path / "out", page)
        table = tables.comparison(summarise(read([file]))).markdown()
        assert page.read_text() == f"# One\n\n<!-- task -->\n{table}\n\nText | with a bar.\n"
    page.write_text("# One\n")
    with pytest.raises(ValueError, match="page.md: there is no line '<!-- task -->' to put the table of task below"):
        analyse([file], tmp_path / "out", page)


def test_a_png_keeps_every_colour_and_says_what_it_shows(tmp_path):
    chart, axes = canvas()
    colours = {colour for colour, *_ in PALETTE.values()}
    for place, colour in enumerate(colours):
        axes.plot([0, 1], [place, place], color=colour, linewidth=4)
    picture = Picture("job", "curves", "Learning curves", "", chart, "at a budget of 8 parameters")
    picture.png(tmp_path / picture.file)
    kept = Image.open(tmp_path / "job-curves.png").convert("RGB").getcolors(2**16)
    assert colours <= {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in kept}
    assert picture.heading == "job: learning curves, at a budget of 8 parameters"
    assert Picture(None, "gains", "Normalised gain", "", chart).heading == "Normalised gain"
    assert picture.heading not in picture.svg()


def test_a_long_heading_takes_a_second_line(tmp_path):
    Picture("job-" * 9, "norms", "How updates grow", "", canvas()[0], "at a budget of 100,000 parameters").png(
        tmp_path / "a"
    )
    drawn = Image.open(tmp_path / "a").convert("L")
    assert drawn.crop((drawn.width - 2, 0, drawn.width, drawn.height)).getextrema()[0] > 240  # no ink


def seeded(job, variant, *values, budget=1000):
    return [row(variant, budget, seed, value=value, job=job) for seed, value in enumerate(values)]


def test_all_pairs_of_runs_over_jobs_and_budgets(tmp_path):
    rows = [
        *seeded("a", "lora", 0.5, 0.6),
        *seeded("a", "flora", 0.53, 0.62, 0.9),
        *seeded("a", "flora", 0.1, budget=2000),  # LoRA has not run there
        *seeded("b", "lora", 0.1),
        *seeded("b", "dora", 0.4),
        *seeded("b", "flora", 0.11),
        *seeded("c", "lora", 12.0),  # no share
        *seeded("c", "flora", 13.0),
    ]
    table = across.pairs(summarise(rows))
    p = ttest_1samp([3, 2, 1], 0).pvalue
    assert table.lines == [
        ["LoRA", "–", "–", "–", "-30.00", "–", "0 of 1"],
        ["DoRA", "+30.00", "–", "1 of 1", "–", "–", "–"],
        ["FLoRA", "+2.00", f"{p:.3f}", "3 of 3", "-29.00", "–", "0 of 1"],
    ]
    one = seeded("a", "lora", 0.5) + seeded("a", "flora", 0.6)
    assert across.pairs(summarise(one)) is None
    two = one + seeded("a", "lora", 0.6, budget=2000) + seeded("a", "flora", 0.8, budget=2000)
    expected = ["FLoRA", "+15.00", f"{ttest_1samp([10, 20], 0).pvalue:.3f}", "2 of 2"]
    assert across.pairs(summarise(two)).lines[0][:4] == expected
    page, file = tmp_path / "page.md", write(tmp_path / "results.jsonl", *rows)
    page.write_text(
        "<!-- a -->\n<!-- b -->\n<!-- c -->\n<!-- pairs: a, b -->\n| old |\n<!-- pairs: a, z -->\n| kept |\n"
    )
    report = analyse([file], tmp_path / "out", page)
    assert page.read_text().endswith(f"<!-- pairs: a, b -->\n{table.markdown()}\n<!-- pairs: a, z -->\n| kept |\n")
    assert "3 of 3" in report.read_text()


def test_older_spectra_end_where_they_fall_into_zeros_and_steps_of_few_seeds_are_left_out():
    assert figures._unpadded([1.0, 0.5, 0.2, 0.01, 1e-4, 1e-17]) == [1.0, 0.5, 0.2]
    assert figures._unpadded([1.0, 0.05, 0.04]) == [1.0, 0.05, 0.04] and figures._unpadded([]) == []
    rows = [row(seed=seed, norms=[[1, 0.1, 1], [2, 0.3 + seed, 1]][seed > 1 :]) for seed in range(4)]
    (line,) = figures._means(summarise(rows), lambda row: [(step, size) for step, size, _ in row["norms"]]).values()
    assert line == [(2, pytest.approx(1.8))]


def test_ticks_are_at_what_was_tried():
    rows = [r for b in (1000, 1024, 30_000, 337_920) for r in grid("flora", b, curve=[])]
    rows += [r for s in (0.04, 0.4, 13) for r in grid(f"flora-{s}", 1000, curve=[])]
    found = {picture.name: picture.chart.axes[0].get_xticklabels() for picture in figures.pictures(summarise(rows))}
    assert [tick.get_text() for tick in found["budgets"]] == ["1k", "30k", "338k"]
    assert [tick.get_text() for tick in found["scales"]] == ["0.04", "0.4", "13"]


def test_the_walls_inside():
    folder = Path(flora_lab.__file__).parent / "analysis"
    walls = {"measure": "matplotlib"} | dict.fromkeys(
        ("fields", "rows", "results", "style", "tables", "drawing", "figures", "page"), "torch"
    )
    for name, forbidden in walls.items():
        nodes = list(ast.walk(ast.parse((folder / f"{name}.py").read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not [module for module in found if module.split(".")[0] == forbidden]


def test_a_report_does_not_wait_for_torch():
    code = "import sys, flora_lab.analysis; print({'torch', 'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
