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
from flora.files import replace_file
from flora_lab.analysis import plots, rows, tables
from flora_lab.methods import METHODS
from flora_lab.run.train import no_accelerator
from flora_lab.run.trial import Trial, base_file, plan, run
from flora_lab.settings import Config, ConfigError

VERSIONS = ("torch", "peft", "transformers", "accelerate", "safetensors", "scikit-learn")
PLACES = ("output", "cache", "fresh", "comparison.*")  # not what comes out of a trial: free to change between starts
FILES = (KEYS := "config.yaml", MARK := "versions.json", rows.RESULTS, "curves.png")
FOLDERS = ("pretraining", "logs", "trials")


def train(config: Config) -> list[dict]:
    """Train with every method of `config`, one after the other; a row of results for each."""
    job = Job(config)
    reasons = plan(config, list(config.methods), [config.budget])
    need_one(reasons)
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


def need_one(reasons: dict[tuple[str, int | None], str | None]) -> None:
    """Raises ConfigError with the first of the reasons where no method can run."""
    if all(reasons.values()):
        (name, _budget), reason = next(iter(reasons.items()))
        raise ConfigError(f"methods.{name}: {reason}")


def learning_rate(config: Config, name: str) -> float:
    return config.methods[name].learning_rate or config.training.learning_rate


class Job:
    """The folder of a run, and its rows."""

    def __init__(self, config: Config, free: tuple[str, ...] = ()):
        """``free``: further keys that may change from one start to the next."""
        self.config, self.free = config, (*PLACES, *free)
        self.folder = Path(config.output)
        if taken := {*FILES, *FOLDERS} & set(config.methods):
            raise ConfigError(f"methods.{min(taken)}: a run's folder has another use for that name")
        self.main = PartialState(cpu=no_accelerator()).is_main_process
        self.wait: Callable[[], None] = PartialState().wait_for_everyone
        if config.threads:
            torch.set_num_threads(config.threads)

    def open(self) -> None:
        """Make the folder this run's: write its keys and versions, or see that an earlier start had the same keys."""
        keys, before = asdict(self.config), self._begun()
        if self.main and before:
            _without_half_line(self.folder / rows.RESULTS)
        self.wait()
        if before and not self.config.fresh:
            self._compare(before, keys)
        if self.main:
            if before and self.config.fresh:
                for path in (self.folder / name for name in (*FOLDERS, *FILES, *METHODS, *self.config.methods)):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            found = {"flora-peft": flora.__version__, "python": platform.python_version()}
            found |= {name: version(name) for name in VERSIONS}
            _write(self.folder / MARK, json.dumps(found, indent=2))
            _write(self.folder / KEYS, yaml.safe_dump(keys, sort_keys=False))
            if self.config.task.source_task():  # hours of training will end in a file there
                Path(self.config.cache).mkdir(parents=True, exist_ok=True)
        self.wait()

    def _begun(self) -> dict | None:
        """The keys of an earlier start. Somebody else's file of that name is nothing to write over."""
        file, mark = self.folder / KEYS, self.folder / MARK
        if not file.exists():
            return None
        try:
            if "flora-peft" in mark.read_text() and isinstance(keys := yaml.safe_load(file.read_text()), dict):
                return keys
        except (OSError, yaml.YAMLError):
            pass
        raise ConfigError(f"{file} is none of flora's, or damaged: choose another folder with output=FOLDER")

    def _compare(self, before: dict, now: dict) -> None:
        """Raise where a start asks for something else than what the folder's rows came of. Methods may come and go."""
        before, now = _flat(before), _flat(now)
        differing = [
            (key, before.get(key), now.get(key))
            for key in before | now
            if before.get(key) != now.get(key)
            and not any(fnmatch(key, pattern) for pattern in self.free)
            and not (key.startswith("methods.") and not (key in before and key in now))
        ]
        for row in self.rows():  # of a method that had gone, too
            if method := self.config.methods.get(row["method"]):
                ran, asked = [row["way"], row["options"]], [self.config.way(row["method"]), method.options]
                differing += [(f"methods.{row['method']}", ran, asked)] if ran != json.loads(json.dumps(asked)) else []
        for key, old, new in differing:
            raise ConfigError(
                f"{self.folder} holds a run with {key}={old}, now {key}={new}: "
                "choose another folder with output=FOLDER, or start over with fresh=true"
            )

    def base_file(self) -> Path | None:
        return base_file(self.config, self.folder, self.main, self.wait)

    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / rows.RESULTS
        try:
            return rows.read([file]) if file.exists() and file.stat().st_size else []
        except ValueError as error:
            raise ConfigError(str(error)) from error

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
    """{"a": {"b": 1}} -> {"a.b": 1}; a method's options are one value."""
    flat = {}
    for key, value in tree.items():
        deeper = isinstance(value, dict) and value and key != "options"
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write_text(text)
