"""One trial: a variant at one budget, seed and learning rate, which is trained, evaluated, saved and loaded again.

Its outcome is a row, a dict of plain values (`analysis.fields`), which is all that tables, figures and tests use.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import peft
import torch
import yaml
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import DataLoader

from flora.files import replace_file
from flora.tuner.planning.plan import count_base_parameters
from flora_lab.analysis.fields import Row
from flora_lab.analysis.measure import Norms, spectra
from flora_lab.methods import METHODS, AdaptedModel, adapt, head_parameters
from flora_lab.run.base import base_model, digest
from flora_lab.run.fit import Fit, fit, steps
from flora_lab.run.folder import Trial, keys_of
from flora_lab.run.machine import Reserved, machine, peak_memory, reset_peak
from flora_lab.run.mirror import Mirror, PushCheckpoints
from flora_lab.run.saved import round_trip, save
from flora_lab.settings import Config
from flora_lab.tasks import Examples, Task

START_BATCHES = 32
KEYS = "keys.json"  # in a trial's folder


def run(config: Config, trial: Trial, file: Path | None, folder: Path) -> Row:
    """The row of a trial. ``file``: the base model's weights, if it has some; ``folder``: for what the trial saves."""
    task, mirror = config.task, Mirror(config)
    _take(folder, keys_of(config, trial))
    mirror.pull(folder)
    if file:
        mirror.fetch(file)
    data = task.splits(config.seed)
    base = base_model(task, file, trial.seed)
    sizes = {
        "head_parameters": head_parameters(base, task.head(base)),
        "model_parameters": count_base_parameters(base),
    }
    keys = replace(config.training, learning_rate=trial.learning_rate)
    norms = _norms(config, trial.variant, base)
    total = steps(keys, data["train"])
    adapted = set_up(config, trial.variant, trial.budget, base, total)
    if adapted.start:
        adapted.start(_batches(task, data["train"], keys.batch_size, trial.seed))
    reserved = Reserved()
    callbacks = [*adapted.callbacks, *filter(None, [norms]), reserved]
    logs = Path(config.output, "logs", folder.name)
    last = [PushCheckpoints(mirror, folder)]
    reset_peak()
    outcome = fit(
        trial.variant,
        adapted.model,
        task,
        data,
        keys,
        trial.seed,
        folder,
        logs,
        callbacks,
        adapted.optimizer,
        last=last,
    )
    memory = {"memory": peak_memory(), **reserved.numbers()}
    row = {
        **subject(config, trial.variant, trial.budget),
        "seed": trial.seed,
        "learning_rate": trial.learning_rate,
        **_evaluate(outcome, data),
        "adapter_parameters": adapted.parameters,
        **sizes,
        "epochs": keys.epochs,
        **_times(outcome, norms),
        **memory,
        "notes": adapted.notes,
        "curve": _curve(outcome, task.metric),
        "norms": norms.records if norms else [],
        "machine": machine(),
    }
    trained = outcome.gathered(partial(_untrained, config, trial, file, total))
    if trained is not None:
        row |= _saved(config, trial, file, trained, folder / "trained", data["test"])
        if norms:
            row["spectra"] = spectra(trained, norms.base)
        row |= _judged(config, trial, file, trained, outcome.trainer.accelerator, data, folder, row)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        mirror.push(folder)
    return row


def _take(folder: Path, keys: Mapping) -> None:
    """Empty a folder that a trial with other keys has left: `fresh=true` can't do so on another machine."""
    if PartialState().is_main_process:
        mark, text = folder / KEYS, json.dumps(keys, indent=2)
        if not mark.exists() or mark.read_text() != text:
            shutil.rmtree(folder, ignore_errors=True)
            with replace_file(mark) as new:
                new.write_text(text)
    PartialState().wait_for_everyone()


# ------------------------------------------------------------------------------------------------------------- set up


def set_up(config: Config, variant: str, budget: int | None, model: nn.Module, total: int) -> AdaptedModel:
    """The model with a variant's adapter. ``total``: optimizer steps of the training. Raises as `adapt` does."""
    method, options = config.method_of(variant), dict(config.methods[variant].options)
    targets = config.target_modules or config.task.targets_of(model)
    return adapt(method, model, config.task.head(model), budget or 0, options, target_modules=targets, steps=total)


def _untrained(config: Config, trial: Trial, file: Path | None, total: int) -> nn.Module:
    return set_up(config, trial.variant, trial.budget, base_model(config.task, file, trial.seed), total).model


def _saved(config: Config, trial: Trial, file: Path | None, model: nn.Module, folder: Path, examples: Examples) -> Row:
    """Save the trained model; its size on disk, and how exactly an adapter comes back unless it diverged."""
    keys = yaml.safe_dump(asdict(config.task), sort_keys=False)
    size = {
        "bytes": save(model, folder, f"## Training\n\n`flora train` trained it on this task:\n\n```yaml\n{keys}```\n")
    }
    diverged = not all(parameter.isfinite().all() for parameter in model.parameters())
    if diverged or not isinstance(model, peft.PeftModel):
        return size
    return size | round_trip(config.task, model, base_model(config.task, file, trial.seed), folder, examples)


def _judged(
    config: Config,
    trial: Trial,
    file: Path | None,
    model: nn.Module,
    accelerator: Accelerator,
    data: dict[str, Examples],
    folder: Path,
    row: Row,
) -> Row:
    """What the task adds to the row (`Task.judge`), with the row's own numbers and notes before it."""
    base = partial(base_model, config.task, file, trial.seed)
    with accelerator.autocast():
        added = config.task.judge(model.to(accelerator.device), base, data, folder)
    merged = {"test": row["test"] | added.pop("test", {}), "notes": [*row["notes"], *added.pop("notes", [])]}
    return merged | added


def _batches(task: Task, examples: Examples, size: int, seed: int) -> Iterable[dict]:
    """The first batches of training, for starts that need gradients."""
    shuffled = torch.Generator().manual_seed(seed)
    loader = DataLoader(examples, size, shuffle=True, generator=shuffled, collate_fn=task.collate)
    return islice(loader, START_BATCHES)


def _norms(config: Config, variant: str, model: nn.Module) -> Norms | None:
    """The callback that measures updates, if the job asks for it, with a copy of weights that the method changes."""
    if not config.comparison.norms:
        return None
    if not METHODS[config.method_of(variant)].changes_base:
        return Norms(config.comparison.norms)
    head = tuple(f"{name}." for name in config.task.head(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith(head)}
    return Norms(config.comparison.norms, weights)


# ------------------------------------------------------------------------------------------------------------ the row


def subject(config: Config, variant: str, budget: int | None) -> Row:
    """The part of a row that says what it is about; the same if the variant was left out."""
    return {
        "job": Path(config.output).resolve().name,
        "settings": _settings(config),
        "metric": config.task.metric,
        "variant": variant,
        "method": config.method_of(variant),
        "options": config.methods[variant].options,
        "budget": budget,
    }


def _settings(config: Config) -> str:
    """Equal for all rows that may be compared: a hash of the data, the model, and how it is trained."""
    source = config.pretraining.decisive() if config.task.source_task() else None
    # a row has its own learning rate; the other two do not change its numbers
    training = replace(config.training, learning_rate=1.0, eval_batch_size=None, loaders=0)
    return digest([config.task.decisive(), training.decisive(), source, config.target_modules, config.seed])


def _evaluate(outcome: Fit, data: dict[str, Examples]) -> dict[str, dict[str, float]]:
    """The metrics of "validation" and "test"."""
    splits = ("validation", "test")
    return {split: _metrics(outcome.trainer.evaluate(data[split], metric_key_prefix=split)) for split in splits}


def _metrics(evaluated: Mapping[str, float]) -> dict[str, float]:
    """{"test_accuracy": 0.9, "test_runtime": 3.1, ...} -> {"accuracy": 0.9, ...}"""
    values = {name.split("_", 1)[1]: value for name, value in evaluated.items() if "_" in name}
    times = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
    loss = values.pop("loss", None)  # some tasks have none in evaluation
    values = values if loss is None or not math.isfinite(loss) else {"loss": loss, **values}
    return {name: float(value) for name, value in values.items() if name not in times}


def _times(outcome: Fit, norms: Norms | None) -> dict[str, float | None]:
    """Also the training loss since the last evaluation but one."""
    state, seconds = outcome.trainer.state, outcome.seconds - (norms.seconds if norms else 0.0)
    return {
        "steps": state.global_step,
        "seconds": seconds,
        "train_seconds": seconds - sum(log.get("eval_runtime", 0.0) for log in state.log_history),
        "epoch_seconds": outcome.epoch_seconds,
        "train_loss": next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None),
    }


def _curve(outcome: Fit, metric: str) -> list[list[float]]:
    """[epoch, validation metric] of every epoch."""
    history, key = outcome.trainer.state.log_history, f"eval_{metric}"
    return [[log["epoch"], log[key]] for log in history if key in log]
