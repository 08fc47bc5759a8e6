"""What `flora train` runs, whatever the task: each method once. And what `flora compare` shares with it: the folder of
a run, with its keys and versions, and its rows, one appended as each trial ends.

Only the main process writes, first under a temporary name. A trial with a row is finished; one that was interrupted
goes on from its last whole checkpoint.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

import flora
from flora.analysis import plots, rows, tables
from flora.files import replace_file
from flora.methods import METHODS
from flora.settings import Config, ConfigError
from flora.train import no_accelerator
from flora.trial import Trial, base_file, plan, run

VERSIONS = ("torch", "peft", "transformers", "accelerate", "safetensors", "scikit-learn")
PLACES = ("output", "cache", "fresh", "comparison.*")  # not what comes out of a trial: free to change between starts
FILES = ("config.yaml", "versions.json", rows.RESULTS, "curves.png")
FOLDERS = ("pretraining", "logs", "trials", *METHODS)


def train(config: Config) -> list[dict]:
    """Train with every method of `config`, one after the other; a row of results for each."""
    job = Job(config)
    reasons = plan(config, list(config.methods), [config.budget])
    if all(reasons.values()):
        name, reason = next((name, reason) for (name, _budget), reason in reasons.items())
        raise ConfigError(f"methods.{name}: {reason}")
    job.open()
    file = job.base_file()
    runnable = [pair for pair, reason in reasons.items() if not reason]
    trials = [Trial(*pair, config.seed, learning_rate(config, pair[0])) for pair in runnable]
    for trial in job.left(trials):
        job.add(run(config, trial, file, job.folder / trial.method))
    found = job.rows_of(trials)
    if job.main:
        curves = job.folder / "curves.png"
        with replace_file(curves) as path:
            plots.figure(found, config.task.metric, path)
        lines = [tables.summary(found), *(f"{name} was left out: {why}" for (name, _), why in reasons.items() if why)]
        print("\n" + "\n".join(lines) + f"\n\neverything is in {job.folder}, the learning curves in {curves}")
    return found


def learning_rate(config: Config, name: str) -> float:
    return config.methods[name].learning_rate or config.training.learning_rate


class Job:
    """The folder of a run, and its rows."""

    def __init__(self, config: Config, free: tuple[str, ...] = ()):
        """``free``: further keys that may change from one start to the next."""
        self.config, self.free = config, (*PLACES, *free)
        self.folder = Path(config.output)
        self.main = PartialState(cpu=no_accelerator()).is_main_process
        self.wait: Callable[[], None] = PartialState().wait_for_everyone
        if config.threads:
            torch.set_num_threads(config.threads)

    def open(self) -> None:
        """Make the folder this run's: write its keys and versions, or see that an earlier start had the same keys."""
        stored, keys = self.folder / "config.yaml", asdict(self.config)
        if stored.exists() and not self.config.fresh:
            before, now = (_flat(tree) for tree in (yaml.safe_load(stored.read_text()), keys))
            for key in before | now:
                free = any(fnmatch(key, pattern) for pattern in self.free)
                other = key.startswith("methods.") and not (key in before and key in now)  # more or fewer methods
                if before.get(key) != now.get(key) and not free and not other:
                    raise ConfigError(
                        f"{self.folder} holds a run with {key}={before.get(key)}, now {key}={now.get(key)}: "
                        "choose another folder with output=FOLDER, or start over with fresh=true"
                    )
        if self.main:
            if stored.exists() and self.config.fresh:
                for path in (self.folder / name for name in (*FOLDERS, *FILES, *self.config.methods)):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            _without_half_line(self.folder / rows.RESULTS)
            _write(stored, yaml.safe_dump(keys, sort_keys=False))
            found = {"flora-peft": flora.__version__, "python": platform.python_version()}
            found |= {name: version(name) for name in VERSIONS}
            _write(self.folder / "versions.json", json.dumps(found, indent=2))
        self.wait()

    def base_file(self) -> Path | None:
        return base_file(self.config, self.folder, self.main, self.wait)

    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / rows.RESULTS
        return rows.read([file]) if file.exists() and file.stat().st_size else []

    def rows_of(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """What came out of the trials that have ended, in their order."""
        ended = self._ended()
        return [ended[trial] for trial in trials if trial in ended]

    def left(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that have not ended yet."""
        ended = self._ended()
        return [trial for trial in trials if trial not in ended]

    def _ended(self) -> dict[Trial, dict[str, Any]]:
        ran = [row for row in self.rows() if "left_out" not in row]
        return {Trial(**{field.name: row[field.name] for field in fields(Trial)}): row for row in ran}

    def add(self, row: dict[str, Any]) -> None:
        if self.main:
            file = self.folder / rows.RESULTS
            with open(file, "a") as results:
                results.write(json.dumps(row) + "\n")
        self.wait()


def _without_half_line(file: Path) -> None:
    """What a run that was killed while it wrote a row has left."""
    text = file.read_text() if file.exists() else ""
    if not text.endswith("\n") and text:
        _write(file, text[: text.rfind("\n") + 1])


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write_text(text)
