"""`flora compare`: which trials run, what chooses a learning rate, and that it goes on where it stopped."""

import json
import posixpath
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from click.testing import CliRunner

from flora.cli import main
from flora.compare import ENGINES
from test_train import SHORT, places, with_methods

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
    changing = ("seconds", "epoch_seconds", "memory", "machine")
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


def test_it_ends_with_a_table_and_a_report(finished):
    folder, _job, result = finished
    assert "FLoRA" in result.output and "LoRA" in result.output and "results.jsonl" in result.output
    assert "<svg" in (folder / "run" / "report.html").read_text()


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


def test_a_killed_comparison_takes_its_workers_with_it(tmp_path):
    arguments = [*with_methods(tmp_path, "head", "flora"), *GRID, "--workers=2", "training.epochs=1000"]
    command = [sys.executable, "-m", "flora.cli", "compare", *map(str, arguments)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "run" / "trials").glob("*/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = process.children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1]


def test_what_cannot_run_is_said_and_left_out(tmp_path):
    result = flora_compare(*with_methods(tmp_path, "head", "lora"), *SHORT, *GRID, "--budgets", "3")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in lines(tmp_path)]
    (left,) = [row for row in rows if "left_out" in row]
    assert left["method"] == "lora" and "above the budget of 3" in left["left_out"]
    assert left["left_out"] in result.output and len(rows) == 4


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
        (["--methods", "lora,dora"], "--methods dora: the job has head, lora"),
        (["--seeds", "1,1"], "comparison.seeds=[1, 1]: expected one or more different values"),
        (["--seeds", "-1"], "comparison.seeds=[-1]: expected at least 0"),
        (["--budgets", "many"], "comparison.budgets"),
        (["--budgets", "0"], "comparison.budgets=[0]: expected at least 1"),
        (["comparison.rates=[]"], "comparison.rates=[]"),
        (["comparison.rates=[1,0]"], "comparison.rates=[1.0, 0.0]: expected a number above 0"),
        (["--engine", "slurm"], "slurm"),
        (["methods.lora.method=loro"], "expected some of"),
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
    keys["methods"]["flora-gradient"] = {"method": "flora", "learning_rate": 1e-2, "options": {"init": "gradient"}}
    job[0].write_text(yaml.safe_dump(keys))
    result = flora_compare(*job, *SHORT, "comparison.seeds=[0]", "comparison.rates=[1]", "comparison.norms=2")
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in plain(tmp_path)}
    assert rows["flora-core"]["way"] == "flora" and rows["flora-core"]["options"] == {"init": "core"}
    assert len({row["adapter_parameters"] for row in rows.values()}) == 1
    assert all(row["norms"] and row["spectra"]["delta"] for row in rows.values())


def test_ray_runs_every_task():  # the local engine has two workers above
    tasks = [("folder", str(number)) for number in range(5)]
    assert sorted(ENGINES["ray"](posixpath.join, tasks, 2)) == [posixpath.join(*task) for task in tasks]
