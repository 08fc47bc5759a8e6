"""`flora compare`: variants × budgets × seeds, as the paper compares (section 5.3, Tables 1 to 3).

Each variant at each budget is tried with its grid of learning rates on the first seed, or on `rate_seeds` of them; the
best on the validation split runs with the other seeds. Every variant gets the same number of trials, and the test split
chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate import PartialState

from flora_lab import analysis
from flora_lab.analysis.fields import Row
from flora_lab.errors import ConfigError, TrialsFailed
from flora_lab.run.folder import OF_TRIALS, Trial, check_comparison, grid, others
from flora_lab.run.job import Job
from flora_lab.run.preflight import preflight, say_left_out
from flora_lab.run.trial import subject
from flora_lab.settings import Config


def compare(config: Config, variants: Sequence[str] = ()) -> list[Row]:
    """Every row of the comparison, old and new. Started again, it continues where it stopped.

    ``variants``: some of the job's, by default all. Raises ConfigError for a mistake in the job, TrialsFailed after all
    others have ended; a variant whose grid is not complete does not run with the other seeds yet.
    """
    check_comparison(config, variants)
    keys = config.comparison
    job = Job(config, OF_TRIALS)
    if PartialState().num_processes > 1 and (keys.workers > 1 or keys.engine != "local"):
        raise ConfigError("several processes share each trial: comparison.workers=1, comparison.engine=local")
    reasons = preflight(config, list(variants or config.methods), keys.budgets or [config.budget])
    job.open()
    say_left_out(reasons, job.main)
    file = job.base_file()
    for (variant, budget), reason in reasons.items():
        if reason and not any((row["variant"], row["budget"]) == (variant, budget) for row in job.rows()):
            job.add({**subject(config, variant, budget), "left_out": reason})
    pairs = [pair for pair, reason in reasons.items() if not reason]

    failures = _run(job, grid(config, pairs), file)
    incomplete = {(trial.variant, trial.budget) for trial in failures}
    complete = [pair for pair in pairs if pair not in incomplete]
    failures |= _run(job, others(config, complete, job.rows()), file)
    if job.main:
        _report(job)
        job.mirror.push(job.folder, [path.name for path in job.folder.iterdir()])
    if failures:
        raise TrialsFailed({trial.name: reason for trial, reason in failures.items()})
    return job.rows()


def _run(job: Job, trials: Iterable[Trial], file: Path | None) -> dict[Trial, str]:
    folders = {trial: job.folder / "trials" / trial.name for trial in trials}
    keys = job.config.comparison
    return job.run(folders, file, keys.engine, keys.workers, bar=True)


def _report(job: Job) -> None:
    rows = job.rows()
    if rows:
        analysis.analyse([job.folder], job.folder)
        print(job.comparison_text(rows))
