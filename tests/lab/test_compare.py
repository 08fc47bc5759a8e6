"""`flora compare`: which trials run, what chooses a learning rate, and that it goes on where it stopped."""

import json
import math
import os
import posixpath
import re
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from click.testing import CliRunner
from test_train import SHORT, places, with_methods

from flora.cli import main
from flora_lab.loading import load_config
from flora_lab.run.engines import ENGINES, Killed, share_of_cpus, take_device
from flora_lab.run.preflight import preflight
from flora_lab.tasks.image_classification import ImageClassification

GRID = ["comparison.seeds=[0,1]", "comparison.rates=[1,3]"]


def flora_compare(*arguments):
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines(folder):
    return (folder / "run" / "results.jsonl").read_text().splitlines()


def plain(folder):
    """Rows without what no two runs share, in a fixed order."""
    changing = ("seconds", "train_seconds", "epoch_seconds", "memory", "machine")
    rows = [{key: value for key, value in json.loads(line).items() if key not in changing} for line in lines(folder)]
    return sorted(rows, key=lambda row: json.dumps([row["method"], row["budget"], row["seed"], row["learning_rate"]]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    job = with_methods(folder, "head", "lora", "flora")
    return folder, job, flora_compare(*job, *SHORT, *GRID, "--budgets", "500,900")


def test_every_method_gets_the_same_trials_at_every_budget(finished):
    folder, _job, result = finished
    assert result.exit_code == 0, result.output
    rows = plain(folder)
    counts = {}
    for row in rows:
        counts.setdefault((row["method"], row["budget"]), []).append((row["seed"], row["learning_rate"]))
    assert set(counts) == {("head", None), *((name, size) for name in ("lora", "flora") for size in (500, 900))}
    for (name, _budget), runs in counts.items():
        centre = {"head": 0.1, "lora": 0.01, "flora": 0.01}[name]
        assert sorted(rate for seed, rate in runs if seed == 0) == pytest.approx([centre, 3 * centre])
        assert [seed for seed, _rate in runs if seed] == [1]
    assert all(row["adapter_parameters"] <= 1.25 * row["budget"] for row in rows if row["budget"])


def test_the_other_seeds_run_with_what_did_best_on_validation(finished):
    rows = plain(finished[0])
    for name in ("head", "lora", "flora"):
        mine = [row for row in rows if row["method"] == name and row["budget"] in (None, 900)]
        tried = [row for row in mine if row["seed"] == 0]
        best = max(row["validation"]["accuracy"] for row in tried)
        (other,) = [row for row in mine if row["seed"] == 1]
        assert other["learning_rate"] in [r["learning_rate"] for r in tried if r["validation"]["accuracy"] == best]


def test_several_seeds_can_choose_the_rate(tmp_path):
    keys = [*SHORT, "comparison.seeds=[0,1,2]", "comparison.rates=[1,3]", "comparison.rate_seeds=2"]
    assert flora_compare(*with_methods(tmp_path, "head"), *keys).exit_code == 0
    runs = [(row["seed"], round(row["learning_rate"], 6)) for row in plain(tmp_path)]
    assert runs[:4] == [(0, 0.1), (0, 0.3), (1, 0.1), (1, 0.3)] and [seed for seed, _ in runs[4:]] == [2]


def test_it_ends_with_a_table_and_a_report(finished):
    folder, _job, result = finished
    assert "FLoRA" in result.output and "LoRA" in result.output and "results.jsonl" in result.output
    assert "<svg" in (folder / "run" / "report.html").read_text()


def test_a_finished_comparison_says_so_and_shows_its_table(finished):
    folder, job, first = finished
    before = (folder / "run" / "results.jsonl").read_bytes()
    again = flora_compare(*job, *SHORT, *GRID, "--budgets", "500,900")
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert again.stderr == "nothing to do: every run has its row; fresh=true starts over\n"
    assert (folder / "run" / "results.jsonl").read_bytes() == before


def test_it_goes_on_where_it_stopped_and_only_adds_what_is_new(finished, tmp_path):
    folder, job, _result = finished
    before = lines(folder)
    file = folder / "run" / "results.jsonl"
    file.write_text("\n".join(before[:-2]) + "\n" + before[-2][:40])  # killed while it wrote the last but one
    again = flora_compare(*job, *SHORT, *GRID, "--budgets", "500,900")
    assert again.exit_code == 0, again.output
    assert lines(folder)[:-2] == before[:-2]
    assert len(lines(folder)) == len(before)
    more = flora_compare(*job, *SHORT, *GRID, "--methods", "head", "--seeds", "0,1,2")
    assert more.exit_code == 0, more.output
    assert len(lines(folder)) == len(before) + 1 and json.loads(lines(folder)[-1])["seed"] == 2


def test_two_workers_find_what_one_does(tmp_path):
    job = with_methods(tmp_path, "flora")
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        one_seed = [*SHORT, *GRID, "--seeds", "1", f"--workers={workers}"]
        result = flora_compare(*job, *places(folder), *one_seed)
        assert result.exit_code == 0, result.output
    assert plain(tmp_path / "1") == plain(tmp_path / "2")


def work(process: psutil.Process) -> float:
    """Seconds that a processor has spent on it; 0 if it has ended."""
    try:
        return sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def test_a_killed_comparison_takes_its_workers_with_it(tmp_path):
    keys = [*GRID, "--workers=2", "pretraining.max_steps=2", "training.epochs=100000"]
    command = [
        sys.executable,
        "-m",
        "flora.cli",
        "compare",
        *map(str, [*with_methods(tmp_path, "head", "flora"), *keys]),
    ]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "run" / "trials").glob("*/checkpoints/*")):
        assert process.poll() is None, "it ended before its first checkpoint"
        # work, not time: a machine under load is slow, but a job needs no more work there
        assert sum(map(work, [process, *process.children(recursive=True)])) < 900, (
            "no checkpoint after 15 minutes' work"
        )
        time.sleep(0.05)
    workers = process.children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    _, left = psutil.wait_procs(workers, timeout=900)  # an exit alone, which no load makes that slow
    assert not left, "a worker goes on without its parent"


def test_a_base_model_is_built_once_for_its_batch_and_once_for_each_variant(tmp_path, monkeypatch):
    path, *keys = with_methods(tmp_path, "head")
    config, built = load_config(path, [*map(str, keys), *SHORT]), []
    task = type(config.task)
    build = task.build
    monkeypatch.setattr(task, "build", lambda task: built.append(task.data) or build(task))
    preflight(config, ["head"], [1])
    assert built == [config.task.source, config.task.data, config.task.data]


@pytest.mark.parametrize("fast", [False, True])
def test_a_processor_without_bfloat16_is_said(fast, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flora_lab.run.preflight.fast_bfloat16", lambda: fast)
    path, *keys = with_methods(tmp_path, "head")
    config = load_config(path, [*map(str, keys), *SHORT, "training.mixed_precision=bf16"])
    assert preflight(config, ["head"], [1]) == {("head", None): None}
    assert ("training.mixed_precision: this processor has no instructions for bf16" in capsys.readouterr().err) != fast


def test_what_cannot_run_is_said_and_left_out(tmp_path):
    result = flora_compare(*with_methods(tmp_path, "head", "lora"), *SHORT, *GRID, "--budgets", "3")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert result.stderr.index("lora is left out at 3 parameters: ") < result.stderr.index("run")
    assert re.search(r"runs 1/1 00:00 left, head: loss \S+, lr 1.0e-1, \S+ GiB, val 0\.\d+\n", result.stderr)
    (left,) = [row for row in rows if "left_out" in row]
    assert left["method"] == "lora" and "above the budget of 3" in left["left_out"]
    assert left["left_out"] in result.output and len(rows) == 4


@pytest.mark.parametrize(("value", "lost"), [(0.0, ["dora"]), (math.nan, [])], ids=["the method's", "the base's"])
def test_a_method_whose_first_loss_is_not_finite_is_left_out(value, lost, tmp_path, monkeypatch):
    """PEFT's DoRA divides by the norm of each filter, and pre-trained networks have filters of zeros."""
    build = ImageClassification.build

    def with_dead_filters(task):
        model = build(task)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data[0] = value
        return model

    monkeypatch.setattr(ImageClassification, "build", with_dead_filters)
    path, *keys = with_methods(tmp_path, "lora")
    keys = [*map(str, keys), *SHORT, "methods.dora.method=dora"]
    reasons = preflight(load_config(path, keys), ["lora", "dora"], [2000])
    assert [name for (name, _), reason in reasons.items() if reason] == lost
    assert set(reasons.values()) <= {None, "its first steps fail: the loss is not finite before any update"}


def test_what_was_left_out_runs_once_it_can(tmp_path):
    job = [*with_methods(tmp_path, "lora"), *SHORT, "comparison.seeds=[0]", "comparison.rates=[1]"]
    assert flora_compare(*job).exit_code == 0
    (row,) = map(json.loads, lines(tmp_path))
    reason = {key: row[key] for key in ("task", "metric", "method", "way", "options", "budget")} | {"left_out": "no"}
    (tmp_path / "run" / "results.jsonl").write_text(json.dumps(reason) + "\n")
    result = flora_compare(*job)
    assert result.exit_code == 0 and "left out" not in result.output.replace("left out, Conv2d", "")
    assert [json.loads(line).get("seed") for line in lines(tmp_path)] == [None, 0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "lora,dora"], "--methods dora: the job has head, lora; methods.dora.learning_rate=1e-3 adds it"),
        (["--methods", "lora,dorra"], "--methods dorra: the job has head, lora\n"),
        (["--seeds", "1,1"], "comparison.seeds=[1, 1]: expected one or more different values"),
        (["--seeds", "-1"], "comparison.seeds=[-1]: expected at least 0"),
        (["--budgets", "many"], "comparison.budgets"),
        (["--budgets", "0"], "comparison.budgets=[0]: expected at least 1"),
        (["comparison.rates=[]"], "comparison.rates=[]"),
        (["comparison.rate_seeds=4"], "comparison.rate_seeds=4: there are 3 seeds"),
        (["comparison.rates=[1,0]"], "comparison.rates=[1.0, 0.0]: expected a number above 0"),
        (["--engine", "slurm"], "slurm"),
        (["--seeds", "99999999999"], "comparison.seeds=[99999999999]: expected at most 4294967295"),
        (["--budgets", "1", "--methods", "lora"], "methods.lora: "),
        (["methods.-evil.method=flora"], "methods.-evil: expected a name of letters, digits"),
        (["methods.logs.method=flora"], "methods.logs: this name is reserved"),
        (["methods.lora.method=loro"], "methods.lora.method=loro: expected one of full, head"),
    ],
)
def test_a_bad_comparison_is_one_line(arguments, named, tmp_path):
    result = flora_compare(*with_methods(tmp_path, "head", "lora"), *arguments)
    assert result.exit_code == 2 and named in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_variant_of_a_method_is_one_of_its_own(tmp_path):
    job = with_methods(tmp_path, "flora")
    keys = yaml.safe_load(job[0].read_text())
    keys["methods"]["flora-core"] = {"method": "flora", "learning_rate": 1e-2, "options": {"init": "core"}}
    for init in ("activations", "gradient"):
        keys["methods"][f"flora-{init}"] = {"method": "flora", "learning_rate": 1e-2, "options": {"init": init}}
    job[0].write_text(yaml.safe_dump(keys))
    result = flora_compare(*job, *SHORT, "comparison.seeds=[0]", "comparison.rates=[1]", "comparison.norms=2")
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in plain(tmp_path)}
    assert rows["flora-core"]["way"] == "flora" and rows["flora-core"]["options"] == {"init": "core"}
    assert len({row["adapter_parameters"] for row in rows.values()}) == 1
    assert all(row["norms"] and row["spectra"]["delta"] for row in rows.values())


def test_one_diverged_run_does_not_stop_the_others(tmp_path):
    keys = [*SHORT, "training.max_steps=5", "comparison.seeds=[0]", "comparison.rates=[1,1e18]"]
    result = flora_compare(*with_methods(tmp_path, "head", "flora"), *keys)
    assert result.exit_code == 0, result.output
    before, line, _ = result.stderr.partition("runs 4/4")
    assert "flora diverged at step" in before and line
    runs = [json.loads(line) for line in lines(tmp_path)]
    assert len(runs) == 4 and sum("merged_difference" in row for row in runs) == 1


def test_a_method_with_other_options_is_another_one(finished):
    _folder, job, _result = finished
    for overrides in (["methods.flora.options.init=core"], ["methods.lora.options.lora_alpha=1", "--methods", "lora"]):
        result = flora_compare(*job, *SHORT, *GRID, *overrides, "--seeds", "0,1,2")
        assert result.exit_code == 2 and "choose another folder" in result.stderr


def test_rows_tell_runs_of_other_settings_apart(finished, tmp_path):
    (settings,) = {row["settings"] for row in plain(finished[0])}
    job = with_methods(tmp_path, "head")
    assert flora_compare(*job, "training.max_steps=1", "pretraining.max_steps=2", "--seeds", "0").exit_code == 0
    assert settings not in {row["settings"] for row in plain(tmp_path)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_trial_costs_no_other_and_is_retried(workers, tmp_path):
    job = [*with_methods(tmp_path, "head", "full"), *SHORT, *GRID, f"comparison.workers={workers}"]
    obstacle = tmp_path / "run" / "trials" / "head-s0-lr0.3"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the trial's folder should be")
    failed = flora_compare(*job)
    assert failed.exit_code == 1, failed.output
    assert "Error: 1 trial failed; start again to retry:\n  head-s0-lr0.3: FileExistsError: " in failed.stderr
    assert "Traceback" in failed.stderr and "full fine-tuning" in failed.stdout
    ended = [(row["method"], row["seed"]) for row in map(json.loads, lines(tmp_path))]
    # its learning rate is not known yet, so the other seeds wait
    assert sorted(ended) == [("full", 0), ("full", 0), ("full", 1), ("head", 0)]
    obstacle.unlink()
    retried = flora_compare(*job)
    assert retried.exit_code == 0, retried.output
    assert [(row["method"], row["seed"]) for row in map(json.loads, lines(tmp_path))][4:] == [("head", 0), ("head", 1)]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_every_task_runs_and_an_error_costs_no_other_result(engine):
    found, failed = [], 0
    for call, result in ENGINES[engine](posixpath.join, [("folder", part) for part in ("1", "2", None, "3")], 2):
        try:
            found.append(result())
            assert found[-1] == posixpath.join(*call)
        except TypeError:
            failed += 1
            assert call == ("folder", None)
    assert sorted(found) == ["folder/1", "folder/2", "folder/3"] and failed == 1


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("workers", [1, 2])
def test_calls_share_the_cpus_of_their_machine(engine, workers):
    ((_, threads),) = ENGINES[engine](eval, [("__import__('torch').get_num_threads()",)], workers)
    assert threads() == max(1, os.cpu_count() // workers)


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [
        ([{"CPU": 8}], 2, 4),
        ([{"CPU": 8}, {"CPU": 8}], 2, 8),
        ([{"CPU": 8}, {"CPU": 8}], 3, 4),
        ([{"CPU": 8}, {"CPU": 8}], 4, 4),
        ([{"CPU": 2}], 4, 1),
        ([{"CPU": 8, "GPU": 1}] * 3, 8, 8),  # three run at a time
        ([{"CPU": 8, "GPU": 4}] * 2, 6, 2),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], 1, 8),  # only the second can
        ([{"CPU": 8}, {"CPU": 2}], 1, 2),  # the second goes on if the first dies
        ([{}, {"CPU": 8}], 2, 4),  # the head node may not take calls
        ([], 2, 1),
    ],
)
def test_the_share_of_a_machine_s_cpus(nodes, workers, share):
    assert share_of_cpus(nodes, workers) == share


def test_a_killed_process_costs_no_other_result():
    kill = "import os; os.kill(os.getpid(), 9)"
    results = dict(ENGINES["local"](exec, [("1",), (kill,), ("2",)], 2))
    assert results["1",]() is results["2",]() is None
    with pytest.raises(Killed, match="perhaps for lack of memory"):
        results[kill,]()


@pytest.mark.parametrize(("given", "seen"), [(None, "0,1"), ("2,3", "2,3"), ("GPU-a,GPU-b", "GPU-a,GPU-b")])
def test_every_worker_sees_one_of_the_gpus_that_were_given(given, seen, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = []
    for index in (0, 1, 2):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        take_device(index)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    first, second = seen.split(",")
    assert found == [first, second, first]
