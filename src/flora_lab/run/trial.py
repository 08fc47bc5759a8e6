"""One run: a base model, one method at one budget, seed and learning rate; trained, judged, saved, and read again.

Its outcome is a row: a dict of plain values, which is all that tables, figures and tests of significance are made of.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed

from flora.files import replace_file
from flora_lab.analysis.measure import Norms, spectra
from flora_lab.methods import METHODS, AdaptedModel, CannotAdapt, adapt, head_parameters
from flora_lab.run.train import arguments, fit, load_statistics, statistics, steps
from flora_lab.settings import Config, ConfigError, Training, one_line
from flora_lab.tasks import Examples, Task
from flora_lab.tasks.pretrained import load_weights

GRADIENT_BATCHES = 8
WEIGHTS, STATISTICS = "model.safetensors", "statistics.safetensors"


@dataclass(frozen=True)
class Trial:
    """``method``: a name in the job's `methods`. ``budget``: None for a method that has none."""

    method: str
    budget: int | None
    seed: int
    learning_rate: float  # to six digits: 0.1 · 3 and 0.3 · 1 are one

    def __post_init__(self):
        object.__setattr__(self, "learning_rate", float(f"{self.learning_rate:.6g}"))

    @property
    def name(self) -> str:
        parts = [self.method, f"{self.budget}" if self.budget else "", f"s{self.seed}", f"lr{self.learning_rate:g}"]
        return "-".join(part for part in parts if part)


def plan(config: Config, methods: list[str], budgets: list[int]) -> dict[tuple[str, int | None], str | None]:
    """Every (method, budget) that is to run, and why it can't if it can't. Each is set up once: whatever can be
    refused is refused here, before the first hour of training.

    Raises ConfigError naming the method and its option, or the file and row of the data.
    """
    try:
        for task in filter(None, [config.task.source_task(), config.task]):
            splits = task.splits(config.seed)
            task.check(splits)
            _try(task, splits["train"], config.training if task is config.task else config.pretraining)
        whole = steps(config.training, splits["train"])
        reasons: dict[tuple[str, int | None], str | None] = {}
        for name in methods:
            size = METHODS[config.way(name)].size
            for budget in budgets if size and size not in config.methods[name].options else [None]:
                reasons[name, budget] = _reason(config, name, budget, whole)
        for keys in ("pretraining", "training"):
            try:
                arguments(getattr(config, keys), config.seed, Path(config.output))
            except ValueError as error:
                raise ConfigError(f"{keys}: {one_line(error)}") from error
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(one_line(error)) from error
    return reasons


def _reason(config: Config, name: str, budget: int | None, steps: int) -> str | None:
    model = config.task.build()
    try:
        _adapt(config, name, budget, model, steps)
    except CannotAdapt as error:
        return str(error)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"methods.{name}: {one_line(error)}") from error
    return None


def _adapt(config: Config, name: str, budget: int | None, model: nn.Module, steps: int) -> AdaptedModel:
    target_modules = config.target_modules or config.task.targets
    options, head = dict(config.methods[name].options), config.task.head(model)
    return adapt(config.way(name), model, head, budget or 0, options, target_modules=target_modules, steps=steps)


def _try(task: Task, examples: Examples, keys: Training) -> None:
    """Put model and data together once, with as few examples as a batch will have."""
    model = task.build().train()
    least = len(examples) % keys.batch_size or keys.batch_size
    batch = [examples[index] for index in range(min(least, 2))]
    try:
        with torch.no_grad():
            model(**task.collate(batch))
    except Exception as error:  # a model's own code may raise anything
        said = f"a batch of {len(batch)} does not pass through the model: {one_line(error)}"
        raise ConfigError(f"{said} (the last batch of {len(examples)} examples has {least})") from error


# ------------------------------------------------------------------------------------------------------ base model


def base_file(config: Config, folder: Path, main: bool, wait: Any) -> Path | None:
    """Weights of the base model, trained here if it does not come pre-trained; kept under a hash of all their keys."""
    task = config.task.source_task()
    if task is None:
        return None
    keys = {"task": asdict(task), "pretraining": asdict(config.pretraining), "seed": config.seed}
    file = Path(config.cache, f"{task.name}-{_digest(keys)}.safetensors")
    if not file.exists():
        set_seed(config.seed)
        data, place = task.splits(config.seed), folder / "pretraining"
        fitted = fit("base", task.build(), task, data, config.pretraining, config.seed, place, folder / "logs" / "base")
        wait()  # the others may still be looking at their checkpoints
        if main:
            with replace_file(file) as temporary:
                tensors = fitted.model.state_dict()  # a copy of each, since safetensors refuses tied ones
                save_file({name: t.contiguous().clone().cpu() for name, t in tensors.items()}, temporary)
            shutil.rmtree(place)
        wait()
    return file


def base_model(task: Task, file: Path | None, seed: int) -> nn.Module:
    """The base model with a new head, drawn from the seed."""
    set_seed(seed)
    model = task.build()
    if file:
        try:
            load_weights(model, str(file), tuple(task.head(model)))
        except ValueError as error:
            raise ConfigError(f"{file} is damaged ({error}): delete it, it will be trained again") from error
    return model


# ------------------------------------------------------------------------------------------------------------- run


def run(config: Config, trial: Trial, file: Path | None, folder: Path, bar: bool = True) -> dict[str, Any]:
    """The row of a trial; in ``folder`` is what it trained."""
    task = config.task
    data = task.splits(config.seed)
    base = base_model(task, file, trial.seed)
    head, size = head_parameters(base, task.head(base)), sum(p.numel() for p in base.parameters())
    keys = replace(config.training, learning_rate=trial.learning_rate)
    adapted = _adapt(config, trial.method, trial.budget, base, steps(keys, data["train"]))
    if adapted.start:
        adapted.start(_batches(task, data["train"], keys.batch_size, trial.seed))
    measured = config.comparison.norms
    before = _weights(base, task.head(base)) if measured and config.way(trial.method) == "full" else None
    norms = Norms(measured, before) if measured else None
    _forget_peak()
    fitted = fit(
        trial.method,
        adapted.model,
        task,
        data,
        keys,
        trial.seed,
        folder,
        Path(config.output, "logs", folder.name),
        [*adapted.callbacks, *filter(None, [norms])],
        bar,
    )
    memory = _peak_memory()
    logged = f"eval_{task.metric}"
    row = {
        **subject(config, trial.method, trial.budget),
        "seed": trial.seed,
        "learning_rate": trial.learning_rate,
        "validation": _numbers(fitted.trainer.evaluate(data["validation"], metric_key_prefix="validation")),
        "test": _numbers(fitted.trainer.evaluate(data["test"], metric_key_prefix="test")),
        "adapter_parameters": adapted.parameters,
        "head_parameters": head,
        "model_parameters": size,
        "epochs": keys.epochs,
        "steps": fitted.trainer.state.global_step,
        "seconds": fitted.seconds - (norms.seconds if norms else 0.0),
        "epoch_seconds": fitted.epoch_seconds,
        "memory": memory,
        "notes": adapted.notes,
        "curve": [[log["epoch"], log[logged]] for log in fitted.trainer.state.log_history if logged in log],
        "norms": norms.rows if norms else [],
        "machine": machine(),
    }
    if fitted.trainer.is_world_process_zero():
        trained = fitted.model.cpu()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape")  # AdaLoRA's that were cut to rank 0
            row["bytes"] = _save(trained, folder / "trained")
        if measured:
            row["spectra"] = spectra(trained, before)
        diverged = not all(parameter.isfinite().all() for parameter in trained.parameters())
        if isinstance(trained, peft.PeftModel) and not diverged:
            row |= _round_trip(task, trained, base_model(task, file, trial.seed), folder / "trained", data["test"])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def subject(config: Config, method: str, budget: int | None) -> dict[str, Any]:
    """What a row is of, whether it ran or was left out."""
    return {
        "task": Path(config.output).resolve().name,
        "settings": _settings(config),
        "metric": config.task.metric,
        "method": method,
        "way": config.way(method),
        "options": config.methods[method].options,
        "budget": budget,
    }


def _settings(config: Config) -> str:
    """The same for all rows that may be compared: a digest of the data, the model, and how it is trained."""
    source = config.pretraining if config.task.source_task() else None
    # a row has its rate, and the other two change none of its numbers
    training = replace(config.training, learning_rate=1.0, eval_batch_size=None, loaders=0)
    keys = [key and asdict(key) for key in (config.task, training, source)]
    return _digest([*keys, config.target_modules, config.seed])


def _digest(keys: Any) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def _weights(model: nn.Module, head: list[str]) -> dict[str, torch.Tensor]:
    """A copy of every weight but the head's."""
    heads = tuple(f"{name}." for name in head)
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith(heads)}


def _batches(task: Task, examples: Examples, size: int, seed: int) -> Any:
    shuffled = torch.Generator().manual_seed(seed)
    loader = DataLoader(examples, size, shuffle=True, generator=shuffled, collate_fn=task.collate)
    return islice(loader, GRADIENT_BATCHES)


def _numbers(evaluated: Mapping[str, float]) -> dict[str, float]:
    """{"test_accuracy": 0.9, "test_runtime": 3.1, ...} -> {"accuracy": 0.9, ...}"""
    named = {name.split("_", 1)[1]: value for name, value in evaluated.items() if "_" in name}
    times = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
    loss = named.pop("loss", None)  # not every task has one in evaluation
    found = named if loss is None or not math.isfinite(loss) else {"loss": loss, **named}
    return {name: float(value) for name, value in found.items() if name not in times}


def _save(model: nn.Module, folder: Path) -> int:
    """What was trained and nothing else, whole or not at all; the size of its weights in bytes."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(part)
        if found := statistics(model):
            save_file(found, part / STATISTICS)
    else:
        part.mkdir(parents=True)
        names = {name for name, _parameter in model.named_parameters(remove_duplicate=False)}
        kept = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}  # ties once
        kept |= {name: tensor for name, tensor in model.state_dict().items() if name not in names}
        save_file({name: tensor.detach().contiguous() for name, tensor in kept.items()}, part / WEIGHTS)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def _round_trip(task: Task, trained: nn.Module, base: nn.Module, folder: Path, examples: Examples) -> dict[str, float]:
    """Largest differences of an output: loaded into a fresh base against trained, and merged against loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)  # AdaLoRA's are others
        loaded = peft.PeftModel.from_pretrained(base, folder)
    if (folder / STATISTICS).exists():
        load_statistics(loaded, folder / STATISTICS)
    few = [[examples[index]] for index in range(min(8, len(examples)))]  # one at a time: outputs may be large

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        return [task.outputs(model.eval(), one).float() for one in few]

    def apart(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        return max((one - other).abs().max().item() for one, other in zip(some, others, strict=True))

    found = outputs(loaded)
    return {
        "loaded_difference": apart(outputs(trained), found),
        "merged_difference": apart(outputs(loaded.merge_and_unload()), found),
    }


# --------------------------------------------------------------------------------------------------------- machine


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is in use now


def _peak_memory() -> int | None:
    """Bytes: the accelerator's, or what this process has held at most, where the system tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
