"""The benchmark commands on tiny models: every workload, with the variants that need no package of their own."""

from __future__ import annotations

import json
import sys
import zipfile
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from flora_lab.methods import CannotAdapt

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VARIANTS = ["floor", "lora", "authors", "flora-auto", "flora-factored", "flora-merged", "flora-k3", "flora-all"]


@pytest.mark.parametrize("command", ["speed", "memory"])
def test_every_workload_runs_tiny(command, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    flags = ["--tiny", "--threads", "1", "--methods", ",".join(VARIANTS), "--output", str(file)]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *flags, *(["--rounds", "1"] if command == "speed" else [])])
    monkeypatch.setattr("speed.REPEATS", 1)
    monkeypatch.setattr("gc.collect", lambda: 0)  # it steadies times, which no test looks at
    import_module(command).main()
    printed = capsys.readouterr().out
    saved = json.loads(file.read_text())
    rows = saved["rows"]
    workloads = {row["workload"] for row in rows}
    assert len(workloads) == 10 and all(name in printed for name in workloads)
    assert saved["machine"]["threads"] == 1 and saved["versions"]["torch"]
    for name in workloads:
        own = {row["method"]: row for row in rows if row["workload"] == name and "parameters" in row}
        assert own["floor"]["parameters"] == 0
        assert all(r["parameters"] <= own["lora"]["parameters"] for m, r in own.items() if m.startswith("flora"))
    if command == "speed":
        assert all(row["classes_kept"] for row in rows if row["measure"] == "merge")


@pytest.mark.parametrize("command", ["speed", "memory"])
def test_a_workload_that_fails_stops_no_other(command, tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    workloads = import_module("workloads").WORKLOADS

    def without_its_package():
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setitem(workloads, "unet", replace(workloads["unet"], tiny=without_its_package))
    file = tmp_path / "rows.json"
    flags = ["--tiny", "--threads", "1", "--workloads", "unet,conv-64", "--methods", "floor,lora", "--channels-last"]
    flags += ["--rounds", "1", "--measure", "step"] if command == "speed" else []
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *flags, "--output", str(file)])
    with pytest.raises(SystemExit, match="failed: unet"):
        import_module(command).main()
    assert "No module named 'diffusers'" in capfd.readouterr().err
    saved = json.loads(file.read_text())
    assert {row["workload"] for row in saved["rows"]} == {"conv-64"} and saved["settings"]["channels_last"]


# operations of one layer, forward and backward, with its part of the pool's
OPERATIONS = {
    "Linear": {"fp32": 5.4, "bf16 autocast": 12, "bf16 base": 10},
    "Conv2d 3×3": {"fp32": 6.5, "bf16 autocast": 13, "bf16 base": 11},
    "Conv2d depthwise 3×3": {"fp32": 6.5, "bf16 autocast": 13, "bf16 base": 11},
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_layer_takes_few_operations(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from launches import KINDS, PRECISIONS, models, operations, step_of

    for precision, most in OPERATIONS[kind].items():
        args = Namespace(seed=0, device="cpu")
        adapted = models(KINDS[kind], PRECISIONS[precision][0], ["lora", "flora-auto"], args)
        lora, ours = (operations(step_of(model, KINDS[kind], precision, "cpu")) for model in adapted.values())
        assert ours <= most and ours <= 0.8 * lora


# operations of one layer that is too large to be merged with others: among twelve, and by itself
LARGE_OPERATIONS = {
    "linear": (
        lambda: nn.Linear(256, 256),
        {"fp32": (9.5, 16.5), "bf16 autocast": (12.3, 20.5), "bf16 base": (10.2, 17.5)},
    ),
    "conv2d": (
        lambda: nn.Conv2d(64, 64, 3, padding=1),
        {"fp32": (20, 27), "bf16 autocast": (21, 31), "bf16 base": (19, 27)},
    ),
    "conv1d": (
        lambda: nn.Conv1d(80, 80, 3, padding=1),
        {"fp32": (15.5, 20), "bf16 autocast": (18.5, 25), "bf16 base": (16.5, 21)},
    ),
    "depthwise": (
        lambda: nn.Conv2d(512, 512, 7, padding=3, groups=512),
        {"fp32": (17, 25), "bf16 autocast": (25, 35), "bf16 base": (23, 31)},
    ),
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", LARGE_OPERATIONS)
def test_a_large_layer_takes_few_operations(kind, alone, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    if alone:
        monkeypatch.setattr(launches, "LAYERS", 1)
        monkeypatch.setattr("flora.tuner.pooled_weight.pooled", lambda weight, execution: None)
    layer, most = LARGE_OPERATIONS[kind]
    channels, *kernel = layer().weight.shape[:1] + layer().weight.shape[2:]
    own = launches.Kind(layer, (2, channels, *(8,) * len(kernel)))
    for precision in most:
        args = Namespace(seed=0, device="cpu")
        (model,) = launches.models(own, launches.PRECISIONS[precision][0], ["flora-auto"], args).values()
        assert launches.operations(launches.step_of(model, own, precision, "cpu")) <= most[precision][alone]


# operations of one layer in a compiler's graph, forward and backward: LoRA's and ours
IN_GRAPH = {
    ("Linear", "fp32"): (12, 11),
    ("Linear", "bf16 autocast"): (22, 23),
    ("Linear", "bf16 base"): (17, 19),
    ("Conv2d 3×3", "fp32"): (10, 16),
    ("Conv2d 3×3", "bf16 autocast"): (19, 29),
    ("Conv2d 3×3", "bf16 base"): (15, 22),
    ("Conv2d depthwise 3×3", "fp32"): (10, 16),
    ("Conv2d depthwise 3×3", "bf16 autocast"): (19, 29),
}


@pytest.mark.filterwarnings("ignore")  # dynamo's own, about torch internals
@pytest.mark.parametrize(("kind", "precision"), IN_GRAPH, ids=" ".join)
def test_a_compiled_layer_takes_few_operations(kind, precision, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    monkeypatch.setattr(launches, "LAYERS", 1)
    torch.compiler.reset()
    own, args = launches.KINDS[kind], Namespace(seed=0, device="cpu")
    adapted = launches.models(own, launches.PRECISIONS[precision][0], ["lora", "flora-auto"], args)
    counts = [launches.operations_in_graph(model, own, precision) for model in adapted.values()]
    assert all(count <= most for count, most in zip(counts, IN_GRAPH[kind, precision], strict=True))


# operations of one layer, of which one twelfth is the model's
ONCE = {
    "Linear": {"wrap": 4.2, "merge_adapter": 6.6, "merge_and_unload": 4.5, "safe_merge": 5},
    "Conv2d 3×3": {"wrap": 6.5, "merge_adapter": 8.5, "merge_and_unload": 6.5, "safe_merge": 7},
    "Conv2d depthwise 3×3": {"wrap": 6.5, "merge_adapter": 8.5, "merge_and_unload": 6.5, "safe_merge": 7},
}


@pytest.mark.parametrize("kind", ONCE)
def test_merging_and_wrapping_wait_once_for_the_whole_model(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from launches import KINDS, LAYERS, operations_once

    for action, (operations, reads) in operations_once(KINDS[kind], "flora-auto").items():
        assert operations <= ONCE[kind][action], action
        assert reads * LAYERS == pytest.approx(1), action


@pytest.mark.parametrize("name", ["conv-192", "depthwise", "experts"])
def test_parameters_are_equal_as_in_a_comparison(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from variants import VARIANTS, adapt_variant, lora_parameters
    from workloads import WORKLOADS

    workload = WORKLOADS[name]
    case = workload.case(tiny=True, seed=0, device="cpu")
    budget = lora_parameters(case.model, workload.targets, workload.lora_rank(tiny=True))
    before, sizes = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}, {}
    for variant in VARIANTS:
        try:
            adapted = adapt_variant(variant, case.model, workload.targets, budget, seed=0)
        except CannotAdapt:
            continue
        case.backward(case.forward(adapted.model))
        sizes[variant] = adapted.parameters
    assert sizes["lora"] == budget and sizes.pop("floor") == 0 and sizes.pop("full") > budget
    assert all(size <= (1 if "flora" in variant else 1.25) * budget for variant, size in sizes.items())
    assert all(torch.equal(before[key], tensor) for key, tensor in case.model.state_dict().items())
    assert {"conv-192": "flora-k3", "depthwise": "flora-all", "experts": "flora-merged"}[name] in sizes


@pytest.mark.parametrize("start", ["gradient", "activations"])
def test_a_start_from_data_is_timed(start, tmp_path, monkeypatch):
    flags = ["--tiny", "--blocks", "2", "--batches", "2", "--threads", "1", "--start", start]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["initialize.py", *flags, "--output", str(tmp_path / "rows.json")])
    import_module("initialize").main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["method"] == start and row["seconds"] > 0 and row["peak_bytes"] > row["model_bytes"]


def test_the_parts_for_a_gpu_are_commands_that_these_scripts_take(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = import_module("gpu")
    args = Namespace(device="cuda", folder=tmp_path, tiny=False)
    outputs: dict[Path, tuple] = {}
    for part, steps in gpu.PARTS.items():
        for step in steps:
            _, script, *flags = gpu.command_of(step, args)
            if script == "-m":
                tests = [flag.partition("::")[0] for flag in flags if flag.startswith("tests/")]
                assert tests and all(Path(BENCHMARKS.parent, test).exists() for test in tests)
                assert str(tmp_path) in flags[flags.index("--junitxml") + 1]
                continue
            monkeypatch.setattr(sys, "argv", [script, *flags])
            own = import_module(Path(script).stem).arguments()
            assert own.device == "cuda" and own.output.parent == tmp_path
            layout, compile = getattr(own, "channels_last", False), getattr(own, "compile", None)
            marks = (part, Path(script).stem, own.precision, compile, layout, tuple(step.environment))
            assert outputs.setdefault(own.output, marks) == marks  # a file has rows of one setting, from one part
    assert len(outputs) == len({output.name for output in outputs}) == 11


ALONE = """import os, sys
from importlib.util import find_spec
assert all(map(find_spec, ("flora", "measure", "carried"))), sys.path
assert sys.argv[sys.argv.index("--device") + 1] == "cpu" and os.environ["MARK_IT"] == "so"
open(sys.argv[sys.argv.index("--output") + 1], "w").write("rows")
"""


def test_a_part_needs_nothing_installed_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """``-S``: without site-packages, as where flora is not installed. Packages come from wheels."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = import_module("gpu")
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "")
    scripts = {"first.py": "raise SystemExit(3)", "second.py": ALONE, "third.py": "import time; time.sleep(600)"}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    steps = {name: gpu.Step(str(tmp_path / name), (), {"MARK_IT": "so"}) for name in scripts}
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu, "PARTS", {1: [steps["first.py"], steps["second.py"]]})
    monkeypatch.setattr(gpu, "name_of", lambda step, args: Path(step.script).stem)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "1", "--device", "cpu", "--folder", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as done:
        gpu.main()
    last = capsys.readouterr().out.partition("not finished:")[2]
    assert done.value.code == 1 and "first.py (exit status 3)" in last and "second.py" not in last
    assert (tmp_path / "out" / "second").read_text() == "rows"
    slow = [str(python), steps["third.py"].script]
    assert gpu.run(steps["third.py"], slow, 0.2, "") == "out of time"
    assert gpu.run(steps["third.py"], slow, -1, "") == "not started"


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("results/speed-*.json")), ids=lambda file: file.stem)
def test_committed_results_can_be_read(file, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from speed import report, rows_of

    assert "**Step, 3×3 convolutions**" in report(rows_of(str(file)))


def test_every_kind_of_fault_is_tried_and_passed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "reliability.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["reliability.py", "--tries", "3", "--output", str(page)])
    module = import_module("reliability")
    module.main()
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [kind.title for kind in module.KINDS.values()]
    for title, tried, passed, *_ in rows:
        assert int(tried) >= 3 and tried == passed, title
