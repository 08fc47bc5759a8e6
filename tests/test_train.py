"""The job behind `flora train`: its files, what it says, and that it goes on after a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from flora import report
from flora.cli import main
from flora.methods import METHODS, adapt
from flora.settings import load_config
from flora.tasks import TASKS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
TINY = {
    "image_classification": ["task.hidden_sizes=[8,8]", "task.depths=[1,1]", "task.train_share=0.05", "budget=500"],
}
SHORT = ["pretraining.max_steps=2", "training.max_steps=2"]


def places(folder):
    return [f"output={folder / 'run'}", f"cache={folder / 'cache'}"]


def flora_train(*arguments):
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def with_methods(folder, *names):
    """The digits job with some of its methods: what a test does not look at need not be trained."""
    job = yaml.safe_load(Path(DIGITS).read_text())
    job["methods"] = {name: job["methods"][name] for name in names}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return [path, *TINY["image_classification"], *places(folder)]


def rows_of(folder):
    """A run's results without the times, which no two runs share."""
    rows = json.loads((folder / "run" / "results.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, flora_train(DIGITS, *TINY["image_classification"], *SHORT, *places(folder))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_two_steps(path, tmp_path):
    result = flora_train(path, *TINY[load_config(path).task.name], *SHORT, *places(tmp_path))
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path)
    assert [row["method"] for row in rows] == list(load_config(path).methods)
    assert all(0 <= row["test"] <= 1 and row["curve"] and row["bytes"] > 0 for row in rows)


def test_a_run_leaves_everything_beside_its_results(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    run = folder / "run"
    for name in ("config.yaml", "versions.json", "results.json", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(run / "config.yaml").budget == 500
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    for name in METHODS:
        assert list((run / "logs" / name).glob("events.*"))
        assert list((run / name / "trained").glob("*.safetensors"))
        assert not (run / name / "checkpoints").exists()
    leftovers = [path for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert not leftovers


def test_the_table_and_the_differences_are_printed(finished):
    _, result = finished
    for label in report.LABELS.values():
        assert f"| {label} " in result.output
    assert "loaded from disk against trained" in result.output and "merged against loaded" in result.output


def test_adapters_come_back_from_disk_as_they_were_trained(finished):
    rows = {row["method"]: row for row in rows_of(finished[0])}
    for name in ("lora", "flora"):
        assert rows[name]["loaded_difference"] < 1e-5 and rows[name]["merged_difference"] < 1e-4


def test_every_method_trains_the_same_head_and_keeps_to_the_budget(finished):
    rows = {row["method"]: row for row in rows_of(finished[0])}
    assert len({row["head_parameters"] for row in rows.values()}) == 1
    assert rows["head"]["adapter_parameters"] == 0
    assert rows["lora"]["adapter_parameters"] <= 500 and rows["flora"]["adapter_parameters"] <= 500
    assert rows["full"]["adapter_parameters"] > 500


def test_a_finished_run_is_read_and_not_repeated(finished):
    folder, _first = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    again = flora_train(DIGITS, *TINY["image_classification"], *SHORT, *places(folder))
    rows = json.loads((folder / "run" / "results.json").read_text())
    assert again.exit_code == 0 and report.summary(rows) in again.output
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}


def test_other_keys_need_another_folder_or_a_fresh_start(tmp_path):
    one = [*with_methods(tmp_path, "head"), *SHORT]
    assert flora_train(*one).exit_code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    other = flora_train(*one, "training.max_steps=3")
    assert other.exit_code == 2
    assert "training.max_steps=2, now training.max_steps=3" in other.stderr and "fresh=true" in other.stderr
    assert flora_train(*one, "training.max_steps=3", "--fresh").exit_code == 0
    assert load_config(tmp_path / "run" / "config.yaml").training.max_steps == 3
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path):
    keys = [*with_methods(tmp_path, "head", "flora"), "pretraining.max_steps=2", "training.epochs=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert flora_train(*keys, *places(whole)).exit_code == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "flora.cli", "train", *keys, *places(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = killed / "run" / "flora" / "checkpoints"
    deadline = time.monotonic() + 90
    while len(list(checkpoints.glob("*/complete.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert (killed / "run" / "head" / "result.json").exists()
    assert not (killed / "run" / "flora" / "result.json").exists()
    half = checkpoints / "checkpoint-1000"  # what a kill in the middle of a save leaves
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_st')

    assert flora_train(*keys, *places(killed)).exit_code == 0
    assert rows_of(killed) == rows_of(whole)
    for name in ("head", "flora"):
        (one,), (two,) = ((folder / "run" / name / "trained").glob("*.safetensors") for folder in (killed, whole))
        one, two = load_file(one), load_file(two)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_two_processes_train_one_run(tmp_path):
    keys = [*with_methods(tmp_path, "lora", "flora"), *SHORT]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, "-m", "flora.cli", "train", *keys], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in rows_of(tmp_path)] == ["lora", "flora"]
    assert done.stdout.count("| FLoRA ") == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks transformers 5 for it
def test_lora_takes_the_highest_rank_within_the_budget():
    task = TASKS["image_classification"](hidden_sizes=[8, 8], depths=[1, 1])
    counts = {}
    for rank in (2, 3):
        model, _ = adapt("lora", task.model("target"), task.head, budget=0, options={"r": rank})
        counts[rank] = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    for budget, rank in ((counts[2], 2), (counts[3] - 1, 2), (counts[3], 3)):
        model, notes = adapt("lora", task.model("target"), task.head, budget, {})
        assert notes[0].startswith(f"rank {rank} ") and "dwconv" in notes[1]
        assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == counts[rank]


def test_digits_are_split_once_and_shown_as_asked():
    upright = TASKS["image_classification"](train_share=0.5)
    turned = TASKS["image_classification"](train_share=0.5)
    turned.source.rotate, turned.source.invert = 90, True
    splits, again, other = upright.splits("source", 0), upright.splits("source", 0), upright.splits("source", 1)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [898, 359, 540]
    assert all(
        torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(splits["test"], again["test"], strict=True)
    )
    assert [e["labels"] for e in splits["test"]] != [e["labels"] for e in other["test"]]
    image, changed = splits["train"][0]["pixel_values"], turned.splits("source", 0)["train"][0]["pixel_values"]
    assert torch.equal(changed, -torch.rot90(image, 1, (1, 2)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks transformers 5 for it
def test_the_example_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = Path(DIGITS).parent.parent.joinpath("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "trainable params" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_a_damaged_base_model_is_named(tmp_path):
    arguments = [*with_methods(tmp_path, "head"), *SHORT]
    assert flora_train(*arguments).exit_code == 0
    (weights,) = (tmp_path / "cache").iterdir()
    weights.write_bytes(weights.read_bytes()[:-10])
    result = flora_train(*arguments, f"output={tmp_path / 'other'}")
    assert result.exit_code == 2 and "is damaged" in result.output and "delete it" in result.output
