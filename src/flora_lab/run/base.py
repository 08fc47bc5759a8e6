"""The base model that all trials of a job start from: trained here first if its task asks for it, and cached."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from flora.files import replace_file, save_tensors
from flora_lab.errors import ConfigError
from flora_lab.run.fit import fit
from flora_lab.run.mirror import Mirror
from flora_lab.settings import Config
from flora_lab.tasks import Task
from flora_lab.tasks.models.pretrained import load_weights


def base_file(config: Config, folder: Path, main: bool, wait: Callable[[], None], mirror: Mirror) -> Path | None:
    """The file of the base model's weights, trained now if it is missing; None if the task's model is pre-trained.

    It comes from the mirror if another machine has trained it, and goes there.

    The file's name has a hash of all the keys that decide on the weights. Raises ConfigError if it is corrupt.
    """
    task = config.task.source_task()
    if task is None:
        return None
    keys = {"task": task.decisive(), "pretraining": config.pretraining.decisive(), "seed": config.seed}
    file = Path(config.cache, f"{task.name}-{digest(keys)}.safetensors")
    if main:
        mirror.fetch(file)
    wait()
    if not file.exists():
        _pretrain(config, task, file, folder, main, wait)
    base_model(config.task, file, config.seed)  # a corrupt file is reported here, before any trial
    if main:
        mirror.share(file)
    return file


def _pretrain(config: Config, task: Task, file: Path, folder: Path, main: bool, wait: Callable[[], None]) -> None:
    set_seed(config.seed)
    data, place = task.splits(config.seed), folder / "pretraining"
    outcome = fit("base", task.build(), task, data, config.pretraining, config.seed, place, folder / "logs" / "base")
    model = outcome.gathered(task.build)
    wait()  # other processes may still be reading their checkpoints
    if model is not None:
        with replace_file(file) as temporary:
            tensors = model.state_dict()  # copied one by one, since safetensors refuses tied tensors
            save_tensors(temporary, {name: t.contiguous().clone().cpu() for name, t in tensors.items()})
        shutil.rmtree(place)
    wait()


def base_model(task: Task, file: Path | None, seed: int) -> nn.Module:
    """The base model with a new head, drawn from the seed. Raises ConfigError if the file is missing or corrupt."""
    set_seed(seed)
    model = task.build()
    if file:
        if not file.exists():
            raise ConfigError(f"{file} is not on this machine: set `mirror`, through which machines share it")
        try:
            load_weights(model, str(file), tuple(task.head(model)))
        except ValueError as error:
            raise ConfigError(f"{file} is corrupt ({error}): delete it, and it will be trained again") from error
    return model


def digest(keys: Any) -> str:
    """A short hash of keys and their values."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
