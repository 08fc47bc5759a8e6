"""`flora compare`: variants × budgets × seeds, as the paper compares (section 5.3, Tables 1 to 3).

Each variant at each budget is tried with its grid of learning rates on the first seed; the best on the validation split
runs with the other seeds. Every variant gets the same number of trials, and the test split chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate import PartialState

from flora_lab import analysis
from flora_lab.analysis import tables
from flora_lab.analysis.fields import Row
from flora_lab.analysis.results import summarise
from flora_lab.analysis.rows import RESULTS
from flora_lab.errors import ConfigError, TrialsFailed
from flora_lab.run.job import Job, learning_rate
from flora_lab.run.preflight import preflight
from flora_lab.run.trial import Trial, subject
from flora_lab.settings import Config

FREE = ("budget", "methods.*.learning_rate", "training.learning_rate")  # every trial names its own


def compare(config: Config, variants: Sequence[str] = ()) -> list[Row]:
    """Every row of the comparison, old and new. Started again, it continues where it stopped.

    ``variants``: some of the job's, by default all. Raises ConfigError for a mistake in the job, TrialsFailed after all
    others have ended; a variant whose grid is not complete does not run with the other seeds yet.
    """
    _check(config, variants)
    keys = config.comparison
    job = Job(config, FREE)
    if PartialState().num_processes > 1 and (keys.workers > 1 or keys.engine != "local"):
        raise ConfigError("several processes share each trial: comparison.workers=1, comparison.engine=local")
    reasons = preflight(config, list(variants or config.methods), keys.budgets or [config.budget])
    job.open()
    file = job.base_file()
    for (variant, budget), reason in reasons.items():
        if reason and not any((row["variant"], row["budget"]) == (variant, budget) for row in job.rows()):
            job.add({**subject(config, variant, budget), "left_out": reason})
    pairs = [pair for pair, reason in reasons.items() if not reason]

    first, *others = keys.seeds
    grid = [Trial(*pair, first, learning_rate(config, pair[0]) * rate) for rate in keys.rates for pair in pairs]
    failures = _run(job, grid, file)
    incomplete = {(trial.variant, trial.budget) for trial in failures}
    best = {pair: _best_rate(job.rows(), pair) for pair in pairs if pair not in incomplete}
    rest = [Trial(*pair, seed, rate) for seed in others for pair, rate in best.items()]
    failures |= _run(job, rest, file)
    if job.main:
        _report(job)
    if failures:
        raise TrialsFailed({trial.name: reason for trial, reason in failures.items()})
    return job.rows()


def _check(config: Config, variants: Iterable[str]) -> None:
    if unknown := set(variants) - set(config.methods):
        raise ConfigError(f"--methods {min(unknown)}: the job has {', '.join(config.methods)}")
    for name in ("seeds", "rates"):
        values = getattr(config.comparison, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"comparison.{name}={values}: expected one or more different values")


def _run(job: Job, trials: Iterable[Trial], file: Path | None) -> dict[Trial, str]:
    folders = {trial: job.folder / "trials" / trial.name for trial in trials}
    keys = job.config.comparison
    return job.run(folders, file, keys.engine, keys.workers, bar=True)


def _best_rate(rows: Iterable[Row], pair: tuple[str, int | None]) -> float:
    """The learning rate that did best on the validation split."""
    return summarise(row for row in rows if (row["variant"], row["budget"]) == pair)[0].learning_rate


def _report(job: Job) -> None:
    rows = job.rows()
    if rows:
        page = analysis.analyse([job.folder], job.folder)
        print("\n" + "\n\n".join([analysis.text(summarise(rows)), *tables.remarks(rows)]))
        print(f"\nevery run is a line of {job.folder / RESULTS}; the report: {page}")
