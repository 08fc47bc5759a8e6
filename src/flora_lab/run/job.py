"""A job: one YAML and its output folder, with the keys and versions that it was started with, and its rows.

Only the main process writes, first under a temporary name. A trial that has a row is finished; an interrupted one
resumes from its last complete checkpoint; a failed one is retried by the next start.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from tqdm.auto import tqdm

import flora
from flora.files import replace_file
from flora.models import quiet
from flora_lab.analysis import rows
from flora_lab.analysis.fields import Row, to_disk
from flora_lab.errors import ConfigError
from flora_lab.methods import METHODS
from flora_lab.run.base import base_file
from flora_lab.run.engines import ENGINES
from flora_lab.run.fit import no_accelerator
from flora_lab.run.trial import Trial, run
from flora_lab.settings import Config, build_config, one_line

VERSIONS = ("torch", "peft", "transformers", "accelerate", "safetensors", "scikit-learn")
FREE = ("output", "cache", "fresh", "comparison.*")  # keys that no row depends on: they may change between starts
FILES = (KEYS := "config.yaml", MARK := "versions.json", rows.RESULTS, "curves.png")
FOLDERS = ("pretraining", "logs", "trials")


def learning_rate(config: Config, variant: str) -> float:
    return config.methods[variant].learning_rate or config.training.learning_rate


class Job:
    """The folder of a job, and its rows."""

    def __init__(self, config: Config, free: tuple[str, ...] = ()):
        """``free``: further keys that may change between starts."""
        self.config, self.free = config, (*FREE, *free)
        self.folder = Path(config.output)
        if reserved := {*FILES, *FOLDERS} & set(config.methods):
            raise ConfigError(f"methods.{min(reserved)}: this name is reserved for a file or folder in the output")
        self.main = PartialState(cpu=no_accelerator()).is_main_process
        self.wait: Callable[[], None] = PartialState().wait_for_everyone
        if config.threads:
            torch.set_num_threads(config.threads)

    # ------------------------------------------------------------------------------------------------------ its folder

    def open(self) -> None:
        """Take the folder: write keys and versions, or check that an earlier start had the same keys."""
        keys, earlier = asdict(self.config), self._earlier_keys()
        if self.main and earlier:
            _drop_half_line(self.folder / rows.RESULTS)
        self.wait()
        if earlier and not self.config.fresh:
            self._check_keys(earlier, keys)
        if self.main:
            if earlier and self.config.fresh:
                self._clear()
            versions = {"flora-peft": flora.__version__, "python": platform.python_version()}
            versions |= {name: version(name) for name in VERSIONS}
            _write(self.folder / MARK, json.dumps(versions, indent=2))
            _write(self.folder / KEYS, yaml.safe_dump(keys, sort_keys=False))
            if self.config.task.source_task():  # fail now rather than after the pre-training
                Path(self.config.cache).mkdir(parents=True, exist_ok=True)
        self.wait()

    def _earlier_keys(self) -> dict | None:
        """The keys of an earlier start, if any. Raises ConfigError if the folder's files are not ours to overwrite."""
        file, mark = self.folder / KEYS, self.folder / MARK
        if not file.exists():
            return None
        try:
            if "flora-peft" in mark.read_text() and isinstance(keys := yaml.safe_load(file.read_text()), dict):
                return keys
        except (OSError, yaml.YAMLError):
            pass
        raise ConfigError(f"{file} was not written by flora, or is corrupt: choose another folder with output=FOLDER")

    def _check_keys(self, earlier: dict, now: dict) -> None:
        """Raise ConfigError if a key differs from the start that made the folder's rows. Variants may come and go."""
        earlier, now = _flat(earlier), _flat(now)
        differing = [
            (key, earlier.get(key), now.get(key))
            for key in earlier | now
            if earlier.get(key) != now.get(key)
            and not any(fnmatch(key, pattern) for pattern in self.free)
            and not (key.startswith("methods.") and not (key in earlier and key in now))
        ]
        for row in self.rows():  # also of variants that an earlier start no longer had
            if variant := self.config.methods.get(row["variant"]):
                key, method = f"methods.{row['variant']}", self.config.method_of(row["variant"])
                old, new = [row["method"], row["options"]], [method, json.loads(json.dumps(variant.options))]
                differing += [(key, old, new)] if old != new else []
        for key, old, new in differing:
            raise ConfigError(
                f"{self.folder} has results with {key}={old}, now {key}={new}: "
                "choose another folder with output=FOLDER, or start over with fresh=true"
            )

    def _clear(self) -> None:
        """Delete what earlier starts wrote."""
        for path in (self.folder / name for name in (*FOLDERS, *FILES, *METHODS, *self.config.methods)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------------- its rows

    def rows(self) -> list[Row]:
        file = self.folder / rows.RESULTS
        try:
            return rows.read([file]) if file.exists() and file.stat().st_size else []
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def rows_of(self, trials: Sequence[Trial]) -> list[Row]:
        """The rows of those trials that have ended, in the order of the trials."""
        ended = self._ended()
        return [ended[trial] for trial in trials if trial in ended]

    def _ended(self) -> dict[Trial, Row]:
        ran = [row for row in self.rows() if "left_out" not in row]
        return {Trial(**{field.name: row[field.name] for field in fields(Trial)}): row for row in ran}

    def add(self, row: Row) -> None:
        if self.main:
            with open(self.folder / rows.RESULTS, "a") as file:
                file.write(json.dumps(to_disk(row)) + "\n")
        self.wait()

    # ------------------------------------------------------------------------------------------------------ its trials

    def base_file(self) -> Path | None:
        return base_file(self.config, self.folder, self.main, self.wait)

    def run(
        self,
        trials: Mapping[Trial, Path],
        file: Path | None,
        engine: str = "local",
        workers: int = 1,
        bar: bool = False,
    ) -> dict[Trial, str]:
        """Run the trials that have no row yet, and add a row as each ends. Returns those that failed, and why.

        ``trials``: with the folder of each. ``file``: the base model's weights. ``bar``: show how many have ended.
        """
        ended = self._ended()
        left = {trial: folder for trial, folder in trials.items() if trial not in ended}
        failures: dict[Trial, str] = {}
        shown = {"total": len(trials), "initial": len(trials) - len(left), "unit": "run"}
        with tqdm(**shown, disable=not (bar and self.main)) as progress:
            for trial, result in self._results(left, file, engine, min(workers, len(left))):
                try:
                    row = result()
                except Exception as error:
                    if PartialState().num_processes > 1:  # the other processes wait for this one
                        raise
                    tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr)
                    failures[trial] = f"{type(error).__name__}: {one_line(error)}"
                    continue
                self.add(row)
                progress.update()
                value = row["validation"][row["metric"]]
                progress.set_postfix_str(f"{trial.variant}, {trial.budget or ''} {row['metric']} {value:.3f}")
        return failures

    def _results(
        self, trials: Mapping[Trial, Path], file: Path | None, engine: str, workers: int
    ) -> Iterator[tuple[Trial, Callable[[], Row]]]:
        """Each trial as it ends, with a function that returns its row or raises its error."""
        if workers < 2 and engine == "local":  # in this process, since `accelerate launch` may have started more
            for trial, folder in trials.items():
                yield trial, partial(run, self.config, trial, file, folder)
            return
        calls = [(asdict(self.config), trial, file, folder, workers) for trial, folder in trials.items()]
        for (_, trial, *_), result in ENGINES[engine](_work, calls, workers):
            yield trial, result


def _work(keys: dict, trial: Trial, file: Path | None, folder: Path, workers: int) -> Row:
    """A trial in a process of its own."""
    quiet()
    config = build_config(keys)
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // workers))
    return run(config, trial, file, folder, bar=False)


def _drop_half_line(file: Path) -> None:
    """Remove the incomplete last row that a killed process left."""
    text = file.read_text() if file.exists() else ""
    if not text.endswith("\n") and text:
        _write(file, text[: text.rfind("\n") + 1])


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; the options of a variant count as one value."""
    flat = {}
    for key, value in tree.items():
        deeper = isinstance(value, dict) and value and key != "options"
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write_text(text)
