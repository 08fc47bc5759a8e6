"""Rows summarised: the learning rate that counts, means over seeds, the t-test. No torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flora_lab.analysis.fields import Row
from flora_lab.analysis.style import OURS, Style, styles

SIGNIFICANT = 0.05
LEVEL_SEEDS = 5  # the test tells next to nothing apart with fewer


@dataclass(frozen=True)
class Result:
    """A variant of a job at one budget, at its best learning rate: one row per seed."""

    job: str
    style: Style
    budget: int | None
    metric: str
    learning_rate: float
    rates: tuple[float, ...]  # the grid, ascending
    rows: list[Row]
    p: float | None = None  # of the paired t-test against FLoRA
    gain: float | None = None  # mean difference from FLoRA over their common seeds

    @property
    def variant(self) -> str:
        return self.style.variant

    @property
    def method(self) -> str:
        return self.style.method

    @property
    def label(self) -> str:
        return self.style.label

    @property
    def values(self) -> dict[int, float]:
        """Test metric by seed."""
        return {row["seed"]: score(row, "test") for row in self.rows}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single seed."""
        return deviation(list(self.values.values()))

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" if the learning rate is at that end of its grid."""
        ends = {self.rates[0]: "lowest", self.rates[-1]: "highest"}
        return ends.get(self.learning_rate) if len(self.rates) > 1 else None

    @property
    def scale(self) -> float | None:
        """The scale s that the variant's options give as a number."""
        scale = (self.rows[0].get("options") or {}).get("scale")
        return scale if self.method == OURS and isinstance(scale, int | float) and scale > 0 else None

    @property
    def epoch_seconds(self) -> float | None:
        """Median over seeds; of an epoch's steps alone if that was recorded, else its share of the training."""
        times = [
            row.get("epoch_seconds") or row["seconds"] / row["epochs"]
            for row in self.rows
            if row.get("epoch_seconds") or (row.get("seconds") and row.get("epochs"))
        ]
        return statistics.median(times) if times else None

    @property
    def memory(self) -> float | None:
        """Peak bytes, median over seeds."""
        peaks = [row["memory"] for row in self.rows if row.get("memory")]
        return statistics.median(peaks) if peaks else None


def score(row: Row, split: str) -> float:
    return row[split][row["metric"]]


def deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def finite(value: float) -> float:
    """To sort by: a trial that diverged (NaN) is the worst."""
    return value if math.isfinite(value) else -math.inf


# ------------------------------------------------------------------------------------------------------ summarising


def summarise(rows: Iterable[Row]) -> list[Result]:
    """The results of all trials; jobs and variants in the order of their first row, budgets ascending after none.

    Learning rate: the best by the mean validation metric of the seeds that tried the most rates, the lower of equals;
    the test split is not looked at. p: two-sided paired t-test on the test metric over common seeds (paper, section 5)
    against FLoRA at the same budget; for a method without a budget, at the ``main_budget``. p is None with fewer than
    two common seeds, or if all differences are equal.
    """
    rows = list(rows)
    style = styles(rows)
    trials: dict[tuple, list[Row]] = {}
    for row in rows:
        if "left_out" not in row:
            trials.setdefault((row["job"], row["variant"], row["budget"]), []).append(row)
    jobs = list(dict.fromkeys(job for job, _, _ in trials))
    variants = list(dict.fromkeys(variant for _, variant, _ in trials))
    keys = sorted(trials, key=lambda key: (jobs.index(key[0]), key[2] or 0, variants.index(key[1])))
    results = by_job(_at_best_rate(trials[key], style[key[:2]]) for key in keys)
    return [_tested(result, job) for job in results.values() for result in job]


def _at_best_rate(trials: Sequence[Row], style: Style) -> Result:
    seeds: dict[int, dict[float, Row]] = {}
    for row in trials:
        seeds.setdefault(row["seed"], {})[row["learning_rate"]] = row
    rates = tuple(sorted(max(seeds.values(), key=len)))
    searched = [rows for rows in seeds.values() if rows.keys() == set(rates)]
    means = {rate: statistics.fmean(finite(score(rows[rate], "validation")) for rows in searched) for rate in rates}
    best = max(rates, key=lambda rate: (means[rate], -rate))
    kept = sorted((row for row in trials if row["learning_rate"] == best), key=lambda row: row["seed"])
    first = kept[0]
    return Result(first["job"], style, first["budget"], first["metric"], best, rates, kept)


def _tested(result: Result, job: Sequence[Result]) -> Result:
    """The result with its p, if the job has FLoRA to compare it with."""
    budget = main_budget(other.budget for other in job) if result.budget is None else result.budget
    ours = plain(job, OURS)
    same = [other for other in ours if other.budget == budget] or (ours if result.budget is None else [])
    if not same or result.variant == same[0].variant:
        return result
    test = paired(result, same[0])
    return replace(result, p=test[0], gain=test[1]) if test else result


def paired(one: Result, other: Result, seeds: int = 2) -> tuple[float, float] | None:
    """p of the paired t-test over common seeds, and the mean difference, one minus other.

    None with fewer common ``seeds``, or if all differences are equal.
    """
    common = sorted(one.values.keys() & other.values.keys())
    if len(common) < seeds:
        return None
    mine, theirs = ([result.values[seed] for seed in common] for result in (one, other))
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    spread = max(differences) - min(differences)
    if not spread > 1e-12 * max(map(abs, (*mine, *theirs))):  # or NaN
        return None
    from scipy.stats import ttest_rel

    return float(ttest_rel(mine, theirs).pvalue), statistics.fmean(differences)


def leading(results: Sequence[Result]) -> list[Result]:
    """Of results at one budget, the best and all that are level with it: the paired t-test over `LEVEL_SEEDS` or more
    does not tell them apart. Empty if the best has fewer seeds."""
    converged = [result for result in results if math.isfinite(result.mean)]
    best = max(converged, key=lambda result: result.mean, default=None)
    if best is None or len(best.rows) < LEVEL_SEEDS:
        return []

    def level(result: Result) -> bool:
        test = paired(result, best, LEVEL_SEEDS)
        return result.mean == best.mean or (test is not None and test[0] >= SIGNIFICANT)

    return [result for result in converged if level(result)]


# ---------------------------------------------------------------------------------------------------------- selecting


def main_budget(budgets: Iterable[int | None]) -> int | None:
    """The most frequent one, the lowest of equals; None if there is none."""
    counts = Counter(budget for budget in budgets if budget is not None)
    return min(counts, key=lambda budget: (-counts[budget], budget), default=None)


def by_job(results: Iterable[Result]) -> dict[str, list[Result]]:
    jobs: dict[str, list[Result]] = {}
    for result in results:
        jobs.setdefault(result.job, []).append(result)
    return jobs


def ordered(results: Iterable[Result]) -> list[Result]:
    """By budget, none first; at one budget as the registry has them."""
    return sorted(results, key=lambda result: (result.budget or 0, result.style.order))


def plain(results: Iterable[Result], method: str) -> list[Result]:
    """A job's results of a method without options, one per budget."""
    candidates = [result for result in results if result.style.plain and result.method == method]
    return [result for result in candidates if result.variant == candidates[0].variant]


def at_main_budget(results: Sequence[Result]) -> tuple[list[Result], str]:
    """A job's results at the budget that most methods ran, with those that have no budget; and that budget in words."""
    main = main_budget(result.budget for result in results)
    kept = [result for result in ordered(results) if result.budget in (None, main)]
    return kept, "methods without a budget" if main is None else f"at a budget of {main:,} parameters"


def chosen(rows: Iterable[Row]) -> list[Row]:
    """The rows at the best learning rate of each (job, variant, budget), see ``summarise``."""
    return [row for result in summarise(rows) for row in result.rows]


def left_out(rows: Iterable[Row]) -> list[Row]:
    """The rows of variants that could not run, one per reason of a (job, variant, budget) that never ran."""
    rows = list(rows)
    ran = {(row["job"], row["variant"], row["budget"]) for row in rows if "left_out" not in row}
    reasons = {}
    for row in rows:
        key = (row["job"], row["variant"], row["budget"])
        if "left_out" in row and key not in ran:
            reasons.setdefault((*key, row["left_out"]), row)
    return list(reasons.values())
