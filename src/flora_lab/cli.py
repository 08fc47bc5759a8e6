"""The laboratory's commands: `flora train`, `flora compare` and `flora analyse`. They join by entry point."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from flora.cli import KeyedCommand, Refused, as_overrides, described_keys


def job_keys() -> Iterator[tuple[str, str]]:
    with job_errors():
        from flora_lab.settings import Config, Method
        from flora_lab.tasks import TASKS

        yield from described_keys(Config)
        yield from described_keys(Method, "methods.NAME.")
        for task in TASKS.values():
            yield from described_keys(task, "task.")


@contextmanager
def job_errors() -> Iterator[None]:
    """Turn what a person can mend into one line and exit code 2."""
    try:
        from flora.models import quiet
        from flora_lab.settings import ConfigError

        quiet()
        try:
            yield
        except (ConfigError, OSError) as error:
            raise Refused(str(error)) from error
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: pip install 'flora-peft[train]'") from error


@click.command(cls=KeyedCommand, keys=job_keys)
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Run the job that the YAML file CONFIG describes.

    Any key can be set after it: `flora train configs/digits.yaml seed=1 training.epochs=3`, or `--seed 1`. An
    interrupted run goes on when it is started again. For several processes: `accelerate launch -m flora.cli train ...`.
    """
    given = as_overrides(overrides)
    with job_errors():
        from flora_lab.run.job import train as run
        from flora_lab.settings import load_config

        run(load_config(config, given))


@click.command(cls=KeyedCommand, keys=job_keys)
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
@click.option("--methods", metavar="A,B", help="Some of the job's methods [all].")
@click.option("--budgets", metavar="N,N", help="comparison.budgets: trainable parameters of an adapter, head aside.")
@click.option("--seeds", metavar="N,N", help="comparison.seeds")
@click.option("--engine", type=click.Choice(["local", "ray"]), help="comparison.engine")
@click.option("--workers", metavar="N", help="comparison.workers: runs at a time.")
def compare(config: str, overrides: tuple[str, ...], methods: str | None, **keys: str | None) -> None:
    """Compare the methods of the job that CONFIG describes: at equal budgets, over seeds, each at its learning rate.

    Every run appends a row to results.jsonl in the job's folder; started again, with more methods, budgets or seeds if
    you like, it goes on from there. At its end it writes report.html beside them.
    """
    lists = [f"comparison.{key}=[{value}]" for key, value in keys.items() if value and key in ("budgets", "seeds")]
    single = [f"comparison.{key}={value}" for key, value in keys.items() if value and key in ("engine", "workers")]
    given = [*as_overrides(overrides), *lists, *single]
    with job_errors():
        from flora_lab.run.compare import compare as run
        from flora_lab.settings import load_config

        run(load_config(config, given), methods.split(",") if methods else ())


@click.command()
@click.argument("folders", nargs=-1, required=True)
@click.option("--out", default=".", show_default=True, help="Folder for report.html, its figures and tables.")
def analyse(folders: tuple[str, ...], out: str) -> None:
    """Make one report of the comparisons in FOLDERS: tables and figures, in a page that needs no network."""
    with job_errors():
        from flora_lab.analysis import analyse as run

        try:
            click.echo(str(run(folders, out)))
        except ValueError as error:  # a line that is no row
            raise Refused(str(error)) from error
