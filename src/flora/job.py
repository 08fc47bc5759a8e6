"""Train one base model in several ways and compare them: what `flora train` runs, whatever the task.

One way: keys -> base model (trained on the source domain, cached) -> each method on the target domain -> table and
figure. Only the main process writes, first under a temporary name. A method with a result.json is finished; one that
was interrupted goes on from its last whole checkpoint.
"""

import hashlib
import json
import os
import platform
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import peft
import torch
import yaml
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import default_data_collator, set_seed

import flora
from flora import report
from flora.files import replace_file
from flora.methods import METHODS, adapt
from flora.settings import Config, ConfigError, one_line
from flora.tasks import Examples
from flora.train import arguments, fit, no_accelerator

VERSIONS = ("torch", "peft", "transformers", "accelerate", "safetensors", "scikit-learn")
PLACES = ("output", "cache", "fresh")  # say where a run writes, not what comes out: free to change between two starts
FILES = ("config.yaml", "versions.json", "results.json", "curves.png")
FOLDERS = ("pretraining", "logs", *METHODS)


def run(config: Config) -> list[dict]:
    """Train with every method of `config`, one after the other; a row of results for each."""
    folder, main = Path(config.output), PartialState(cpu=no_accelerator()).is_main_process
    if config.threads:
        torch.set_num_threads(config.threads)
    _check(config)
    _open(config, folder, main)
    weights = _base_weights(config, folder, main)
    data = config.task.splits("target", config.seed)
    rows = []
    for name in config.methods:
        result = folder / name / "result.json"
        if not result.exists():
            row = _run_method(name, config, data, weights, folder / name)
            if main:
                _write(result, json.dumps(row, indent=2))
                shutil.rmtree(folder / name / "checkpoints")
            PartialState().wait_for_everyone()
        rows.append(json.loads(result.read_text()))
    if main:
        _write(folder / "results.json", json.dumps(rows, indent=2))
        with replace_file(folder / "curves.png") as file:
            report.figure(rows, config.task.metric, file)
        print(f"\n{report.summary(rows)}\n\neverything is in {folder}, the learning curves in {folder / 'curves.png'}")
    return rows


def _check(config: Config) -> None:
    """Refuse what can be refused before the first hour of training: every method and fit is set up once."""
    for name, method in config.methods.items():
        try:
            adapt(name, config.task.model("target"), config.task.head, config.budget, method.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"methods.{name}: {one_line(error)}") from error
    for name in ("pretraining", "training"):
        try:
            arguments(getattr(config, name), config.seed, Path(config.output))
        except ValueError as error:
            raise ConfigError(f"{name}: {one_line(error)}") from error


def _open(config: Config, folder: Path, main: bool) -> None:
    """Make `folder` this run's: write its keys and versions, or see that an earlier start had the same keys."""
    stored, keys = folder / "config.yaml", asdict(config)
    if stored.exists() and not config.fresh:
        before, now = (_flat(tree) for tree in (yaml.safe_load(stored.read_text()), keys))
        for key in before | now:
            if before.get(key) != now.get(key) and key not in PLACES:
                raise ConfigError(
                    f"{folder} holds a run with {key}={before.get(key)}, now {key}={now.get(key)}: "
                    "choose another folder with output=FOLDER, or start over with fresh=true"
                )
    if main:
        if stored.exists() and config.fresh:
            for path in (folder / name for name in (*FOLDERS, *FILES)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        _write(stored, yaml.safe_dump(keys, sort_keys=False))
        found = {"flora-peft": flora.__version__, "python": platform.python_version()}
        found |= {name: version(name) for name in VERSIONS}
        _write(folder / "versions.json", json.dumps(found, indent=2))
    PartialState().wait_for_everyone()


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _base_weights(config: Config, folder: Path, main: bool) -> dict[str, torch.Tensor]:
    """Weights of the source model. Trained once, and kept under a hash of all the keys that they depend on."""
    keys = asdict(config)
    decides = {**keys["task"], "target": None, "pretraining": keys["pretraining"], "seed": config.seed}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(config.cache, f"{config.task.name}-{digest}.safetensors")
    if not file.exists():
        set_seed(config.seed)
        data = config.task.splits("source", config.seed)
        trainer, _ = fit("base", config.task.model("source"), data, config.pretraining, config, folder / "pretraining")
        if main:
            with replace_file(file) as temporary:
                save_file({name: t.contiguous().cpu() for name, t in trainer.model.state_dict().items()}, temporary)
            shutil.rmtree(folder / "pretraining")
        PartialState().wait_for_everyone()
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}): delete it, it will be trained again") from error


def _base_model(config: Config, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The source model with a new head for the target domain, drawn from the seed."""
    set_seed(config.seed)
    model = config.task.model("target")
    heads = tuple(f"{name}." for name in config.task.head)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
    model.load_state_dict(model.state_dict() | kept)
    return model


def _run_method(name: str, config: Config, data: dict[str, Examples], weights: dict, folder: Path) -> dict:
    base = _base_model(config, weights)
    head = sum(p.numel() for module in config.task.head for p in base.get_submodule(module).parameters())
    model, notes = adapt(name, base, config.task.head, config.budget, config.methods[name].options)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = config.methods[name].learning_rate or config.training.learning_rate
    trainer, seconds = fit(name, model, data, replace(config.training, learning_rate=rate), config, folder)
    metric, logged = config.task.metric, f"eval_{config.task.metric}"
    row = {
        "method": name,
        "metric": metric,
        "test": trainer.evaluate(data["test"], metric_key_prefix="test")[f"test_{metric}"],
        "adapter_parameters": trainable - head,
        "head_parameters": head,
        "seconds": seconds,
        "seed": config.seed,
        "notes": notes,
        "curve": [(log["epoch"], log[logged]) for log in trainer.state.log_history if logged in log],
    }
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).cpu()
        row["bytes"] = _save(trained, folder / "trained")
        if isinstance(trained, peft.PeftModel):
            row |= _round_trip(trained, _base_model(config, weights), folder / "trained", data["test"][:64])
    return row


def _save(model: nn.Module, folder: Path) -> int:
    """What was trained and nothing else, whole or not at all; the size of its weights in bytes."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(part)
    else:
        part.mkdir(parents=True)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        kept = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, part / "model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _round_trip(trained: nn.Module, base: nn.Module, folder: Path, examples: Examples) -> dict[str, float]:
    """Largest differences of an output: loaded into a fresh base against trained, and merged against loaded."""
    loaded = peft.PeftModel.from_pretrained(base, folder)
    outputs = [_outputs(trained, examples), _outputs(loaded, examples), _outputs(loaded.merge_and_unload(), examples)]
    return {
        "loaded_difference": (outputs[1] - outputs[0]).abs().max().item(),
        "merged_difference": (outputs[2] - outputs[1]).abs().max().item(),
    }


@torch.no_grad()
def _outputs(model: nn.Module, examples: Examples) -> torch.Tensor:
    batch = default_data_collator(examples)
    batch.pop("labels")
    return model.eval()(**batch)[0].float()


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write_text(text)
