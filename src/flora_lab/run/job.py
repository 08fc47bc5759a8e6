"""A job: one YAML and its output folder, with the keys and versions that it was started with, and its rows.

Only the main process writes, first under a temporary name. A trial that has a row is finished; an interrupted one
resumes from its last complete checkpoint; a failed one is retried by the next start.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm

import flora
from flora.files import full_disk, replace_file
from flora.models import quiet
from flora_lab.analysis.fields import Row, to_disk
from flora_lab.analysis.rows import RESULTS
from flora_lab.lines import Line
from flora_lab.loading import build_config, one_line
from flora_lab.methods import METHODS
from flora_lab.run.base import base_file
from flora_lab.run.engines import ENGINES
from flora_lab.run.fit import no_accelerator
from flora_lab.run.folder import FILES, FOLDERS, KEYS, MARK, Folder, Trial
from flora_lab.run.mirror import Mirror
from flora_lab.run.progress import numbers
from flora_lab.run.trial import run
from flora_lab.settings import Config

# how long the others wait while the main process loads, samples and tests alone; NCCL would give up after 10 minutes
PATIENCE = timedelta(days=1)
VERSIONS = ("torch", "peft", "transformers", "accelerate", "safetensors", "scikit-learn")


class Job(Folder):
    """The folder of a job that runs: it is taken, and gets rows."""

    def __init__(self, config: Config, free: tuple[str, ...] = ()):
        super().__init__(config, free)
        self.main = PartialState(cpu=no_accelerator(), timeout=PATIENCE).is_main_process
        self.wait: Callable[[], None] = PartialState().wait_for_everyone
        self.mirror = Mirror(config)
        if config.threads:
            torch.set_num_threads(config.threads)

    # ------------------------------------------------------------------------------------------------------ its folder

    def open(self) -> None:
        """Take the folder: write keys and versions, or check that an earlier start had the same keys."""
        if self.main:
            self.mirror.pull(self.folder, FILES)
        self.wait()
        keys, earlier = asdict(self.config), self.earlier_keys()
        if self.main and earlier:
            _drop_half_line(self.folder / RESULTS)
        self.wait()
        if earlier and not self.config.fresh:
            self.check_keys(earlier, keys)
        if self.main:
            if earlier and self.config.fresh:
                self._clear()
            versions = {"flora-peft": flora.__version__, "python": platform.python_version()}
            versions |= {name: version(name) for name in VERSIONS}
            _write(self.folder / MARK, json.dumps(versions, indent=2))
            _write(self.folder / KEYS, yaml.safe_dump(keys, sort_keys=False))
            if self.config.task.source_task():  # fail now rather than after the pre-training
                Path(self.config.cache).mkdir(parents=True, exist_ok=True)
            self.mirror.push(self.folder, FILES)
        self.wait()

    def _clear(self) -> None:
        """Delete what earlier starts wrote."""
        names = dict.fromkeys([*FOLDERS, *FILES, *METHODS, *self.config.methods])
        for path in (self.folder / name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.mirror.clear(names)

    def add(self, row: Row) -> None:
        if self.main:
            with open(self.folder / RESULTS, "a") as file:
                file.write(json.dumps(to_disk(row)) + "\n")
            self.mirror.push(self.folder, [RESULTS])
        self.wait()

    # ------------------------------------------------------------------------------------------------------ its trials

    def base_file(self) -> Path | None:
        return base_file(self.config, self.folder, self.main, self.wait, self.mirror)

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
        line = Line("runs", len(trials), len(trials) - len(left), shown=bool(left) and bar and self.main)
        with closing(line):
            for trial, result in self._results(left, file, engine, min(workers, len(left))):
                try:
                    row = result()
                except Exception as error:
                    # the other processes wait for this one; and on a full disk no other trial would do better
                    if PartialState().num_processes > 1 or full_disk(error):
                        raise
                    tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr)
                    failures[trial] = f"{type(error).__name__}: {one_line(error)}"
                    continue
                self.add(row)
                of_run = row["train_loss"], trial.learning_rate, row["memory"], row["validation"][row["metric"]]
                line.advance(f"{line.fitted(trial.variant)}: {numbers(*of_run)}")
        return failures

    def _results(
        self, trials: Mapping[Trial, Path], file: Path | None, engine: str, workers: int
    ) -> Iterator[tuple[Trial, Callable[[], Row]]]:
        """Each trial as it ends, with a function that returns its row or raises its error."""
        if workers < 2 and engine == "local":  # in this process, since `accelerate launch` may have started more
            for trial, folder in trials.items():
                yield trial, partial(run, self.config, trial, file, folder)
            return
        calls = [(asdict(self.config), trial, file, folder) for trial, folder in trials.items()]
        for (_, trial, *_), result in ENGINES[engine](_work, calls, workers):
            yield trial, result


def _work(keys: dict, trial: Trial, file: Path | None, folder: Path) -> Row:
    """A trial in a process of its own."""
    quiet()
    Line.hidden = True
    config = build_config(keys)
    if config.threads:
        torch.set_num_threads(config.threads)
    return run(config, trial, file, folder)


def _drop_half_line(file: Path) -> None:
    """Remove the incomplete last row that a killed process left."""
    text = file.read_text() if file.exists() else ""
    if not text.endswith("\n") and text:
        _write(file, text[: text.rfind("\n") + 1])


def _write(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write_text(text)
