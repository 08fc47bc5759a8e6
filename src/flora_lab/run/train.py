"""`flora train`: one trial per variant, one after the other."""

from __future__ import annotations

from flora.files import replace_file
from flora_lab.analysis import figures
from flora_lab.analysis.fields import Row
from flora_lab.errors import TrialsFailed
from flora_lab.run.folder import FILES, Trial, learning_rate
from flora_lab.run.job import Job
from flora_lab.run.preflight import preflight, say_left_out
from flora_lab.settings import Config


def train(config: Config) -> list[Row]:
    """Train every variant of the job at its budget, and print a table. The rows, one per variant.

    Raises ConfigError for a mistake in the job, TrialsFailed after all others have ended.
    """
    job = Job(config)
    reasons = preflight(config, list(config.methods), [config.budget])
    job.open()
    say_left_out(reasons, job.main)
    file = job.base_file()
    runnable = [pair for pair, reason in reasons.items() if not reason]
    trials = [Trial(*pair, config.seed, learning_rate(config, pair[0])) for pair in runnable]
    failures = job.run({trial: job.folder / trial.variant for trial in trials}, file)
    rows = job.rows_of(trials)
    if job.main and rows:
        with replace_file(job.curves) as path:
            figures.trained(rows, config.task.metric, path)
        job.mirror.push(job.folder, FILES)
        print(job.training_text(rows, [f"{name} was left out: {why}" for (name, _), why in reasons.items() if why]))
    if failures:
        raise TrialsFailed({trial.name: reason for trial, reason in failures.items()})
    return rows
