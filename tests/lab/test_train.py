"""The job behind `flora train`: its files, what it says, and that it goes on after a kill."""

import ast
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_task_glue
import test_task_instance
import test_task_language
import test_task_oriented
import test_task_semantic
import test_task_text_to_image
import test_task_visual
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_task_images import parquet
from transformers import Trainer, TrainerState, TrainingArguments

from flora.cli import main
from flora_lab.loading import load_config
from flora_lab.methods import METHODS, Method
from flora_lab.run import preflight as checks
from flora_lab.run.fit import Checkpoints, arguments
from flora_lab.run.preflight import preflight
from flora_lab.run.saved import save
from flora_lab.run.trainer import TaskTrainer
from flora_lab.settings import Training
from flora_lab.tasks.image_classification import ImageClassification
from processes import FORKED, START

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
TINY = [
    "task.model.config.hidden_sizes=[8,8]",
    "task.model.config.depths=[1,1]",
    "task.model.config.num_stages=2",
    *(f"task.{part}.train_examples=36" for part in ("data", "source")),
    *(f"task.{part}.validation_examples=20" for part in ("data", "source")),
    *(f"task.{part}.test_examples=40" for part in ("data", "source")),
    "budget=500",
]


def tiny_images(folder):
    """What turns an image job into one of two steps: images and a model of no size."""
    parquet(folder / "train.parquet", [0, 1, 2] * 8)
    parquet(folder / "test.parquet", [0, 1, 2])
    return [f"task.data.path={folder}", "task.model.config.depth=8", "task.model.weights=null", "budget=6000"]


def tiny(path, folder):
    """The overrides that make a shipped job small enough for a test, by its file or its task."""
    task = yaml.safe_load(path.read_text())["task"]  # not all of its packages are here
    if path.stem == "digits":
        return TINY
    if path.stem == "cifar-efficientnet":
        keys = [key for key in tiny_images(folder) if not key.startswith(("task.model.config", "budget"))]
        return [*keys, "task.data.size=32"]
    if path.stem == "dota-two":
        keys = [key for key in test_task_oriented.tiny_data(folder) if not key.startswith("task.backbone.config")]
        return [*keys, "task.backbone.config.backbone=test_efficientnet", "budget=5000"]
    if path.stem == "ade20k-internvit":
        vit = ", ".join(f"{key}: {value}" for key, value in {"model_type": "internvl_vision", **VIT}.items())
        keys = [key for key in test_task_semantic.tiny_data(folder) if not key.startswith("task.backbone.config")]
        return [*keys, f"task.backbone.config={{{vit}}}", "budget=1500"]
    if task["name"] == "glue":
        return test_task_glue.tiny_keys(folder, task["subset"])
    if task["name"] == "text_to_image":
        return test_task_text_to_image.tiny_keys(folder, path.stem)
    if task["name"] == "language":
        return test_task_language.tiny_keys(folder, path)
    if task["name"] == "visual_instruction":
        return test_task_visual.tiny_keys(folder, path)
    return {
        "image_classification": tiny_images,
        "semantic_segmentation": test_task_semantic.tiny_data,
        "instance_segmentation": test_task_instance.tiny_data,
        "oriented_detection": test_task_oriented.tiny_data,
    }[task["name"]](folder)


VIT = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 24,
       "patch_size": 4}  # fmt: skip
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
    return [path, *TINY, *places(folder)]


def rows_of(folder):
    """A run's results without the times, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]
    own = ("seconds", "train_seconds", "epoch_seconds", "memory")
    return [{key: value for key, value in row.items() if key not in own} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, flora_train(DIGITS, *TINY, *SHORT, *places(folder))


LEFT_OUT = {
    "cifar-shift": {"houlsby", "pfeiffer"},  # it asks for adapters of transformer blocks in a ResNet
    "cifar-efficientnet": {"hira", "locon"},  # which drop the padding of its strided convolutions
}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in CONFIGS])
def test_every_config_is_set_up_and_runs_two_steps(path, tmp_path):
    grid = ["comparison.seeds=[0]", "comparison.rates=[1]", "comparison.rate_seeds=1"]
    overrides = [*tiny(path, tmp_path), *SHORT, *places(tmp_path), *grid]
    config = load_config(path, overrides)
    reasons = preflight(config, list(config.methods), [config.budget])
    assert {name for name, _budget in reasons} == set(config.methods)
    left_out = {name for (name, _budget), reason in reasons.items() if reason}
    assert left_out == LEFT_OUT.get(path.stem, set())
    result = CliRunner().invoke(
        main, ["compare", str(path), *overrides, "--methods", "flora", "--budgets", str(config.budget)]
    )
    assert result.exit_code == 0, result.output
    (row,) = rows_of(tmp_path)
    assert row["curve"] and row["bytes"] > 0 and row["metric"] in row["test"]


def test_a_run_leaves_everything_beside_its_results(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    run = folder / "run"
    for name in ("config.yaml", "versions.json", "results.jsonl", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(run / "config.yaml").budget == 500
    assert json.loads((run / "versions.json").read_text())["torch"] == version("torch")
    for name in ("full", "head", "lora", "flora"):
        assert list((run / "logs" / name).glob("events.*"))
        assert list((run / name / "trained").glob("*.safetensors"))
        assert not (run / name / "checkpoints").exists()
    leftovers = [path for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert not leftovers


def test_the_table_and_the_differences_are_printed(finished):
    _, result = finished
    for label in ("full fine-tuning", "head only", "LoRA", "FLoRA"):
        assert f"| {label} " in result.output
    assert "loaded from disk against trained" in result.output and "merged against loaded" in result.output


def test_an_adapter_s_card_names_its_data(finished):
    card = (finished[0] / "run" / "flora" / "trained" / "README.md").read_text()
    assert "name: image_classification" in card and "path: digits" in card and "import flora" in card


def test_adapters_come_back_from_disk_as_they_were_trained(finished):
    rows = {row["method"]: row for row in rows_of(finished[0])}
    for name in ("lora", "flora"):
        assert rows[name]["loaded_difference"] < 1e-5 and rows[name]["merged_difference"] < 1e-4


def test_every_method_trains_the_same_head_and_keeps_to_the_budget(finished):
    rows = {row["method"]: row for row in rows_of(finished[0])}
    assert len({row["head_parameters"] for row in rows.values()}) == 1
    assert rows["head"]["adapter_parameters"] == 0
    assert rows["lora"]["adapter_parameters"] <= 1.25 * 500 and rows["flora"]["adapter_parameters"] <= 500
    assert rows["full"]["adapter_parameters"] > 500


def test_a_finished_run_is_read_and_not_repeated(finished):
    folder, first = finished
    before = (folder / "run" / "results.jsonl").read_bytes()
    again = flora_train(DIGITS, *TINY, *SHORT, *places(folder))
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert again.stderr == "nothing to do: every run has its row; fresh=true starts over\n"
    assert (folder / "run" / "results.jsonl").read_bytes() == before


def test_a_finished_run_waits_for_no_heavy_package(finished):
    folder, _ = finished
    arguments = ["train", DIGITS, *TINY, *SHORT, *places(folder)]
    call = f"from flora.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    code = f"{call}import sys; print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nothing to do" in done.stderr
    assert not {"torch", "transformers", "peft", "matplotlib"} & {*ast.literal_eval(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("size", [9_000, 40_000])
def test_a_full_disk_is_one_line_and_the_next_start_goes_on(size, tmp_path):
    job = [*with_methods(tmp_path, "head", "lora"), *SHORT]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        result = flora_train(*job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: the disk or quota is full (") and last.endswith("and the next start goes on")
    assert "Traceback" not in result.stderr
    assert flora_train(*job).exit_code == 0


def test_the_data_are_looked_through_once(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(ImageClassification, "check", lambda task, splits: looked.append(task.data))
    assert flora_train(*with_methods(tmp_path, "head", "full"), *SHORT).exit_code == 0
    job = load_config(tmp_path / "run" / "config.yaml").task
    assert looked == [job.source, job.data]


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


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    for name in ("config.yaml", "logs/mine.txt"):
        (run / name).write_text("# mine")
    for more in ([], ["fresh=true"]):
        result = flora_train(*with_methods(tmp_path, "head"), *SHORT, *more)
        assert result.exit_code == 2 and "was not written by flora" in result.stderr and "fresh" not in result.stderr
    assert {path.name for path in run.rglob("*")} == {"config.yaml", "logs", "mine.txt"}


def test_a_damaged_row_is_named(tmp_path):
    job = [*with_methods(tmp_path, "head"), *SHORT]
    assert flora_train(*job).exit_code == 0
    file = tmp_path / "run" / "results.jsonl"
    file.write_text("{broken\n" + file.read_text())
    result = flora_train(*job)
    assert result.exit_code == 2 and "results.jsonl, line 1" in result.stderr


@pytest.mark.parametrize(("more", "steps"), [([], 4), (["training.max_steps=3"], 3), (["training.max_steps=9"], 4)])
def test_a_number_of_steps_ends_a_training_and_does_not_lengthen_it(more, steps, tmp_path):
    job = with_methods(tmp_path, "head")
    result = flora_train(*job, "pretraining.max_steps=2", "training.epochs=2", "training.batch_size=18", *more)
    assert result.exit_code == 0, result.output
    (row,) = rows_of(tmp_path)
    assert row["steps"] == steps


def test_what_does_not_pass_through_the_model_is_said_before_any_training(tmp_path):
    result = flora_train(*with_methods(tmp_path, "head"), "task.model.config.num_channels=4")
    assert result.exit_code == 2 and "does not pass through the model" in result.stderr
    assert not (tmp_path / "run").exists()


class Recorder(torch.nn.Linear):
    def forward(self, x):
        self.seen.append((self.weight.device.type, x.device.type))
        return {"loss": torch.zeros(())}


@pytest.mark.parametrize(("fsdp", "where"), [("false", "meta"), ("true", "cpu")])
def test_the_first_batch_passes_where_the_model_will_be_trained(fsdp, where, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    monkeypatch.setattr(checks, "PartialState", lambda cpu: SimpleNamespace(device=torch.device("meta")))
    model = Recorder(2, 2)
    model.seen = []
    task = SimpleNamespace(build=lambda: model, collate=lambda few: {"x": torch.zeros(len(few), 2)})
    checks._forward(task, [{}], Training(), 1)
    assert model.seen == [(where, where)]


def test_checkpointing_is_refused_for_a_model_without_it(tmp_path):
    result = flora_train(*with_methods(tmp_path, "head"), "training.gradient_checkpointing=true")
    assert result.exit_code == 2 and "=true: ConvNextV2ForImageClassification does not support it" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_takes_one_gpu_and_no_frozen_weight_decays(tmp_path, monkeypatch):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"], use_dora=True))
    trainer = TaskTrainer(model, arguments(Training(), 1, 0, tmp_path), eval_dataset=[])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = trained & set(trainer.get_decay_parameter_names(model))
    assert [name.split(".")[-3] for name in sorted(decayed)] == ["lora_A", "lora_B"] and len(trained) == 3
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    assert arguments(Training(), 1, 0, tmp_path)._n_gpu == 1


@pytest.mark.parametrize(("value", "diverged"), [(0.2, False), (math.nan, True)])
def test_a_detector_without_a_loss_in_evaluation_has_not_diverged(value, diverged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"eval_loss": math.nan, "eval_mAP": value})
    trainer = TaskTrainer(torch.nn.Linear(1, 1), arguments(Training(), 1, 0, tmp_path), eval_dataset=[])
    trainer.title = "flora"
    trainer.evaluate()
    assert trainer.diverged == diverged == ("diverged at step 0" in capsys.readouterr().err)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text(Path(DIGITS).read_text())
    keys = [f"{key}=~/{key}" for key in ("output", "cache", "task.data.path", "task.source.path", "task.model.weights")]
    config = load_config("~/job.yaml", keys)
    found = [config.output, config.cache, config.task.data.path, config.task.source.path, config.task.model.weights]
    assert found == [str(tmp_path / key.partition("=")[0]) for key in keys]


def test_tied_weights_are_saved_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save(model, tmp_path / "trained")
    assert set(load_file(tmp_path / "trained" / "model.safetensors")) == {"0.weight", "0.bias", "1.bias"}


def test_an_epoch_s_seconds_are_those_of_its_steps(tmp_path, monkeypatch):
    now = 0.0

    def after(seconds, event, **given):
        nonlocal now
        now += seconds
        getattr(checkpoints, f"on_{event}")(args, state, None, **given)

    monkeypatch.setattr("flora_lab.run.fit.time", SimpleNamespace(perf_counter=lambda: now))
    args, state = SimpleNamespace(output_dir=tmp_path), TrainerState(epoch=0, global_step=3)
    (tmp_path / "checkpoint-3").mkdir()
    checkpoints = Checkpoints(tmp_path)
    after(7, "epoch_begin")
    after(2, "step_end")
    after(2, "step_end")
    after(50, "evaluate", metrics={"eval_runtime": 30})  # and pictures for 20
    after(60, "save", model=torch.nn.Linear(1, 1))
    after(2, "step_end")
    after(0, "epoch_end")
    after(90, "evaluate", metrics={})
    assert checkpoints.epochs == [6] and checkpoints.seconds() == 213


def _train_and_be_killed(keys):
    """Two epochs of FLoRA have their checkpoints by then, and the third has been trained."""
    end, ended = Checkpoints.on_epoch_end, count(1)

    def on_epoch_end(self, args, *rest, **kwargs):
        end(self, args, *rest, **kwargs)
        if Path(args.output_dir).parent.name == "flora" and next(ended) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.on_epoch_end = on_epoch_end
    flora_train(*keys)


@pytest.mark.parametrize("more", [[], ["training.eval_steps=4", "training.batch_size=12"]], ids=["epochs", "steps"])
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(more, tmp_path):
    keys = [*with_methods(tmp_path, "head", "flora"), "pretraining.max_steps=2", "training.epochs=6", *more]
    keys.append("comparison.norms=4")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert flora_train(*keys, *places(whole)).exit_code == 0

    process = FORKED.Process(target=_train_and_be_killed, args=([*keys, *places(killed)],))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    checkpoints = killed / "run" / "flora" / "checkpoints"
    assert len(list(checkpoints.glob("*/complete.json"))) == 2
    assert [row["method"] for row in rows_of(killed)] == ["head"]
    half = checkpoints / "checkpoint-1000"  # what a kill in the middle of a save leaves
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_st')

    assert flora_train(*keys, *places(killed)).exit_code == 0
    assert rows_of(killed) == rows_of(whole)
    for name in ("head", "flora"):
        (one,), (two,) = ((folder / "run" / name / "trained").glob("*.safetensors") for folder in (killed, whole))
        one, two = load_file(one), load_file(two)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_method_that_cannot_run_is_left_out_and_said(tmp_path):
    result = flora_train(*with_methods(tmp_path, "head", "lora"), *SHORT, "budget=3")
    assert result.exit_code == 0 and "lora was left out: rank 1 has" in result.output
    assert [row["method"] for row in rows_of(tmp_path)] == ["head"]
    nothing = flora_train(*with_methods(tmp_path, "lora"), *SHORT, "budget=3", f"output={tmp_path / 'other'}")
    assert nothing.exit_code == 2 and "methods.lora: rank 1 has" in nothing.stderr


def test_a_method_may_have_an_optimizer_of_its_own(tmp_path, monkeypatch):
    made = []

    def with_sgd(request, **options):
        adapted = METHODS["lora"].build(request, **options)

        def optimizer(args):
            made.append(torch.optim.SGD(adapted.model.parameters(), args.learning_rate))
            return made[-1]

        return replace(adapted, optimizer=optimizer)

    monkeypatch.setitem(METHODS, "sgd", Method(with_sgd, "LoRA with SGD", "r"))
    job = [*with_methods(tmp_path, "lora"), *SHORT, "methods.lora.method=sgd", "methods.lora.learning_rate=0.5"]
    result = flora_train(*job)
    assert result.exit_code == 0, result.output
    assert made[-1].param_groups[0]["initial_lr"] == 0.5 and rows_of(tmp_path)[0]["way"] == "sgd"


def test_a_failed_variant_costs_no_other_and_is_retried(tmp_path):
    job = [*with_methods(tmp_path, "head", "full"), *SHORT]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "head").write_text("a file where the variant's folder should be")
    failed = flora_train(*job)
    assert failed.exit_code == 1, failed.output
    assert "1 trial failed; start again to retry:\n  head-s0-lr0.1: FileExistsError: " in failed.stderr
    assert "| full fine-tuning " in failed.stdout and [row["method"] for row in rows_of(tmp_path)] == ["full"]
    (tmp_path / "run" / "head").unlink()
    retried = flora_train(*job)
    assert retried.exit_code == 0 and "| head only " in retried.stdout
    assert [row["method"] for row in rows_of(tmp_path)] == ["full", "head"]


def _train_as(rank, port, keys, folder):
    process = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in process.items()})  # as torchrun and accelerate do
    result = flora_train(*keys)
    (folder / f"{rank}.out").write_text(result.stdout)
    assert result.exit_code == 0, result.output


def test_two_processes_train_one_run(tmp_path):
    keys = [*with_methods(tmp_path, "lora", "flora"), *SHORT]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_train_as, (port, keys, tmp_path), nprocs=2, start_method=START)
    assert [row["method"] for row in rows_of(tmp_path)] == ["lora", "flora"]
    assert [(tmp_path / f"{rank}.out").read_text().count("| FLoRA ") for rank in (0, 1)] == [1, 0]


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
    assert result.exit_code == 2 and "is corrupt" in result.output and "delete it" in result.output
