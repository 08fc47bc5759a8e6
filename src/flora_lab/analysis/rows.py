"""Recorded runs, read and put together: which learning rate counts, means over seeds, the t-test. Plain rows, no torch.

A row is one run, a JSON object; `flora compare` appends it to results.jsonl. A row with "left_out" is a method that
can't run, and says why.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flora_lab.analysis.fields import Row, check

RESULTS = "results.jsonl"
REFERENCE = "flora"  # the method that the others are tested against
SIGNIFICANT = 0.05
ALIKE = {  # key: in the rows of what it is one and the same
    "metric": ("task",),
    "settings": ("task",),
    "way": ("task", "method"),
    "options": ("task", "method"),
}


def read(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of files, or of every results.jsonl in or below folders. Of a run that is there twice, the last.

    A last line cut short, which a killed run leaves, is dropped with a warning. Raises ValueError naming file and line
    for any other line that is no row, and for one of another run than an earlier row of its name (`ALIKE`); and where
    there is nothing to read.
    """
    files = [file for path in paths for file in _files(Path(path))]
    runs: dict[tuple, Row] = {}
    first: dict[tuple, tuple[Any, str]] = {}
    for file in files:
        for number, row in _lines(file):
            where = f"{file}, line {number}"
            check(row, where)
            for key, of in ALIKE.items():
                _check_alike(row, key, of, where, first)
            run = tuple(row.get(name) for name in ("task", "method", "budget", "seed", "learning_rate"))
            runs.pop(run, None)
            runs[run] = row
    if not runs:
        raise ValueError(f"no runs in {', '.join(map(str, files))}")
    return list(runs.values())


def _files(path: Path) -> list[Path]:
    files = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: " + (f"no {RESULTS} in or below it" if path.is_dir() else "no such file or folder"))
    return files


def _lines(file: Path) -> Iterable[tuple[int, Row]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number}: not whole JSON ({error})") from error
            warnings.warn(f"{file}, line {number}: cut short, left out", stacklevel=4)


def _check_alike(row: Row, key: str, of: tuple[str, ...], where: str, first: dict[tuple, tuple[Any, str]]) -> None:
    """``first``: values met so far, and where. A row without the key, an older one, is taken as it is."""
    if row.get(key) is None:
        return
    value, there = first.setdefault((key, *(row[name] for name in of)), (row[key], where))
    if row[key] != value:
        what = ", ".join(f"{name} {row[name]!r}" for name in of)
        raise ValueError(
            f"{where}: {key}={row[key]!r} of {what}, which has {value!r} in {there}: different runs under one name; "
            "analyse them apart, or rename the output or the method of one"
        )


@dataclass(frozen=True)
class Result:
    """A method on a task at a budget, at its learning rate: one run a seed."""

    task: str
    method: str
    budget: int | None
    metric: str
    learning_rate: float
    rates: tuple[float, ...]  # the grid, ascending
    runs: list[Row]
    p: float | None = None  # of the paired t-test against FLoRA
    gain: float | None = None  # mean difference to FLoRA over their common seeds

    @property
    def values(self) -> dict[int, float]:
        """Test metric by seed."""
        return {run["seed"]: score(run, "test") for run in self.runs}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return deviation(list(self.values.values()))

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" where the learning rate is at that end of its grid."""
        ends = {self.rates[0]: "lowest", self.rates[-1]: "highest"}
        return ends.get(self.learning_rate) if len(self.rates) > 1 else None

    @property
    def epoch_seconds(self) -> float | None:
        """Median over runs: of an epoch's steps alone where that was recorded, else of the whole training."""
        found = [
            run.get("epoch_seconds") or run["seconds"] / run["epochs"]
            for run in self.runs
            if run.get("epoch_seconds") or (run.get("seconds") and run.get("epochs"))
        ]
        return statistics.median(found) if found else None

    @property
    def memory(self) -> float | None:
        """Peak bytes, median over runs."""
        found = [run["memory"] for run in self.runs if run.get("memory")]
        return statistics.median(found) if found else None


def score(row: Row, split: str) -> float:
    return row[split][row["metric"]]


def deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def chosen(rows: Iterable[Row]) -> list[Row]:
    """The runs at the learning rate of each (task, method, budget), see ``results``."""
    return [run for result in results(rows) for run in result.runs]


def results(rows: Iterable[Row]) -> list[Result]:
    """What is compared: tasks and methods in the order of their first row, budgets ascending after none.

    Learning rate: of the seed that ran the most rates (the first such), the one with the best validation metric, the
    lower of equals; the test split is not looked at. p: two-sided paired t-test on the test metric over common seeds
    (paper, section 5) against FLoRA at the same budget, for a method without one at the ``main_budget``. None with
    fewer than two such seeds, or where the differences do not differ.
    """
    trials: dict[tuple, list[Row]] = {}
    for row in rows:
        if "left_out" not in row:
            trials.setdefault((row["task"], row["method"], row["budget"]), []).append(row)
    found = {key: _at_best_rate(runs) for key, runs in trials.items()}
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    methods = list(dict.fromkeys(method for _, method, _ in found))
    order = sorted(found, key=lambda key: (tasks.index(key[0]), key[2] or 0, methods.index(key[1])))
    ours = {task: [key for key in order if key[:2] == (task, REFERENCE)] for task in tasks}
    tested = []
    for task, method, budget in order:
        result = found[task, method, budget]
        wanted = main_budget(at for of, _, at in found if of == task) if budget is None else budget
        same = [key for key in ours[task] if key[2] == wanted] or ours[task] * (budget is None)
        tested.append(_against(result, found[same[0]]) if same and method != REFERENCE else result)
    return tested


def main_budget(budgets: Iterable[int | None]) -> int | None:
    """The most frequent one, the lowest of equals; None where there is none."""
    counts = Counter(budget for budget in budgets if budget is not None)
    return min(counts, key=lambda budget: (-counts[budget], budget), default=None)


def by_task(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.task, []).append(result)
    return found


def _at_best_rate(trials: list[Row]) -> Result:
    seeds: dict[int, list[Row]] = {}
    for row in trials:
        seeds.setdefault(row["seed"], []).append(row)
    tried = max(seeds.values(), key=len)
    # a run that diverged has NaN: the worst
    best = max(tried, key=lambda row: (finite(score(row, "validation")), -row["learning_rate"]))
    runs = [row for row in trials if row["learning_rate"] == best["learning_rate"]]
    rates = tuple(sorted({row["learning_rate"] for row in tried}))
    what = [best[key] for key in ("task", "method", "budget", "metric", "learning_rate")]
    return Result(*what, rates, sorted(runs, key=lambda row: row["seed"]))


def finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _against(result: Result, reference: Result) -> Result:
    seeds = sorted(result.values.keys() & reference.values.keys())
    if len(seeds) < 2:
        return result
    mine, theirs = ([one.values[seed] for seed in seeds] for one in (result, reference))
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    spread = max(differences) - min(differences)
    if not spread > 1e-12 * max(map(abs, (*mine, *theirs))):  # or NaN
        return result
    from scipy.stats import ttest_rel

    return replace(result, p=float(ttest_rel(mine, theirs).pvalue), gain=statistics.fmean(differences))


def left_out(rows: Iterable[Row]) -> list[Row]:
    """The rows of methods that could not run, one for each reason of a (task, method, budget) that never ran."""
    rows = list(rows)
    ran = {(row["task"], row["method"], row["budget"]) for row in rows if "left_out" not in row}
    found = {}
    for row in rows:
        key = (row["task"], row["method"], row["budget"])
        if "left_out" in row and key not in ran:
            found.setdefault((*key, row["left_out"]), row)
    return list(found.values())
