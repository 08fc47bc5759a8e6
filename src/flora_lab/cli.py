"""The laboratory's commands: `flora train`, `flora compare` and `flora analyse`. They join `flora` by entry point."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from flora.files import full_disk
from flora.keys import KeyedCommand, ListingCommand, Refused, as_overrides, described_keys, flags
from flora_lab.errors import ConfigError, TrialsFailed
from flora_lab.sources import hint

EXTRAS = {
    "trl": "language",
    "lm_eval": "lm-eval",
    "lmms_eval": "lmms-eval",
    "ray": "grid",
}  # the extra of a package that is not in [train]
NOTHING_TO_DO = "nothing to do: every run has its row; fresh=true starts over"


def job_keys() -> Iterator[tuple[str, str]]:
    """Every key of a job, with its help."""
    with job_errors():
        from flora_lab.settings import Config, Variant
        from flora_lab.tasks import TASKS

        yield from described_keys(Config)
        yield from described_keys(Variant, "methods.NAME.")
        for task in TASKS.values():
            yield from described_keys(task, "task.")


def job_flags() -> Iterator[str]:
    """The keys of a job that are true or false."""
    from flora_lab.settings import Config
    from flora_lab.tasks import TASKS

    yield from flags(Config)
    for task in TASKS.values():
        yield from flags(task, "task.")


class Interrupted(click.ClickException):
    """Ctrl-C, which loses nothing."""

    exit_code = 130  # the shell's for it


@contextmanager
def job_errors(*mistakes: type[Exception]) -> Iterator[None]:
    """A user's mistake, and a full disk, become one line and exit code 2; trials that failed, a line each and exit code
    1.

    Args:
        mistakes: further errors that are a user's mistake in this command.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted: the next start goes on where this one stopped") from error
    except (ConfigError, OSError, *mistakes) as error:
        raise Refused(f"{error}{hint(str(error))}") from error
    except TrialsFailed as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0], "train")
        raise Refused(f"{error.name} is not installed: pip install 'flora-peft[{extra}]'") from error
    except Exception as error:
        if reason := full_disk(error):
            raise Refused(f"{reason}: free some space, and the next start goes on") from error
        raise


def alone() -> bool:
    """Whether no other process works on the same job (`accelerate launch`)."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@click.command(cls=KeyedCommand, keys=job_keys, short_help="Train the variants of a job, a YAML file.")
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train every variant of the job in the YAML file CONFIG, and print a table.

    Any key can be set on the command line: `flora train configs/digits.yaml seed=1 training.epochs=3`, or `--seed 1`.
    Started again, an interrupted job resumes. For several processes: `accelerate launch -m flora.cli train ...`.
    """
    with job_errors():
        from flora_lab.loading import load_config
        from flora_lab.run.folder import Folder

        job = load_config(config, as_overrides(overrides, job_flags))  # before the imports that take seconds
        folder = Folder(job)
        if alone() and (rows := folder.trained()):
            click.echo(folder.training_text(rows))
            click.echo(NOTHING_TO_DO, err=True)
            return

        from flora.models import quiet

        quiet()
        from flora_lab.run.train import train as run

        run(job)


@click.command(cls=KeyedCommand, keys=job_keys, short_help="Compare them at equal budgets, over seeds.")
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
@click.option("--methods", metavar="A,B", help="Some of the job's variants [all].")
@click.option("--budgets", metavar="N,N", help="comparison.budgets: trainable parameters of an adapter, without head.")
@click.option("--seeds", metavar="N,N", help="comparison.seeds")
@click.option("--engine", type=click.Choice(["local", "ray"]), help="comparison.engine")
@click.option("--workers", metavar="N", help="comparison.workers: trials that run at the same time.")
def compare(config: str, overrides: tuple[str, ...], methods: str | None, **keys: str | None) -> None:
    """Compare the variants of the job in CONFIG: at equal budgets, over seeds, each at its best learning rate.

    Every trial appends a row to results.jsonl in the job's folder, and at the end report.html is written beside it.
    Started again, also with more variants, budgets or seeds, the comparison runs what is missing.
    """
    lists = [f"comparison.{key}=[{value}]" for key, value in keys.items() if value and key in ("budgets", "seeds")]
    single = [f"comparison.{key}={value}" for key, value in keys.items() if value and key in ("engine", "workers")]
    some = methods.split(",") if methods else ()
    with job_errors():
        from flora_lab.loading import load_config
        from flora_lab.run.folder import OF_TRIALS, Folder, check_comparison

        # before the imports that take seconds
        job = load_config(config, [*as_overrides(overrides, job_flags), *lists, *single])
        check_comparison(job, some)
        folder = Folder(job, OF_TRIALS)
        if alone() and (rows := folder.compared(some)):
            click.echo(folder.comparison_text(rows))
            click.echo(NOTHING_TO_DO, err=True)
            return

        from flora.models import quiet

        quiet()
        from flora_lab.run.compare import compare as run

        run(job, some)


@click.command(short_help="Make one report of several comparisons.")
@click.argument("folders", nargs=-1, required=True)
@click.option("--out", default=".", show_default=True, help="Folder for report.html, its figures and tables.")
@click.option("--into", metavar="FILE", help="Markdown file: replace each job's table, below its line <!-- JOB -->.")
@click.option("--peft", metavar="FOLDER", help="Results of PEFT's method_comparison, for a table with them: peft.md.")
def analyse(folders: tuple[str, ...], out: str, into: str | None, peft: str | None) -> None:
    """Make one report of the comparisons in FOLDERS: tables and figures, on a page that needs no network."""
    with job_errors(ValueError):  # a line that is not a valid row
        from flora_lab.analysis import analyse as run

        click.echo(str(run(folders, out, into, peft)))


@click.command(short_help="Fetch the data and weights of a job.")
@click.argument("what", nargs=-1, metavar="[NAME | CONFIG]...")
def data(what: tuple[str, ...]) -> None:
    """Fetch data and weights into the folder data/, each checked: those that NAME says, or that the job in the YAML
    file CONFIG reads.

    Without an argument, the names are listed. What is here already is not fetched again.
    """
    from flora_lab.sources import SOURCES, fetch, names_in, place

    with job_errors(ValueError):
        for name in [name for one in what for name in names_in(one)]:
            click.echo(fetch(name))
    if not what:
        for name, source in SOURCES.items():
            click.echo(
                f"{name:28} {source.about}; {'here: ' + place(name) if Path(place(name)).exists() else 'not here'}"
            )


def layouts() -> Iterator[tuple[str, str]]:
    """Every task, with how its data lie."""
    with job_errors():
        from flora_lab.starter import LAYOUTS
        from flora_lab.tasks import TASKS

        yield from ((task, LAYOUTS[task]) for task in TASKS)


@click.command(
    cls=ListingCommand, heading="Tasks", rows=layouts, short_help="Write a commented YAML for your own data."
)
@click.argument("task")
@click.argument("file", required=False)
def init(task: str, file: str | None) -> None:
    """Write one complete YAML for a job of TASK on your own data, each key explained.

    FILE, by default TASK.yaml, must not exist.
    """
    with job_errors():
        from flora.files import new_file
        from flora.text import did_you_mean
        from flora_lab.starter import LAYOUTS, starter

        if task not in LAYOUTS:
            raise ConfigError(f"{task}: expected one of {', '.join(LAYOUTS)}{did_you_mean(task, LAYOUTS)}")
        out = file or f"{task}.yaml"
        with new_file(out) as path:
            path.write_text(starter(task), encoding="utf-8")
        click.echo(f"{out}: put your data there ({LAYOUTS[task]}), then `flora train {out}`")
