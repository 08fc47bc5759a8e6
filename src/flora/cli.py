"""The `flora` command: each subcommand is one call. A mistake is one line that names it, and exit code 2."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, get_type_hints

import click

from flora import __version__


class Refused(click.ClickException):
    exit_code = 2


class Keys(click.Command):
    """A command with `key=value` arguments after its options; its help ends in the list of the keys."""

    def __init__(self, *args, keys, **kwargs):
        super().__init__(*args, **kwargs)
        self.keys = keys  # called for the help only: importing what it lists takes seconds

    def format_epilog(self, ctx, formatter):
        with formatter.section("Keys [default]"):
            formatter.write_dl(list(self.keys()))


def train_keys() -> Iterator[tuple[str, str]]:
    from flora.settings import Config, Method
    from flora.tasks import TASKS

    yield from _describe(Config)
    yield from _describe(Method, "methods.NAME.")
    for task in TASKS.values():
        yield from _describe(task, "task.")


def plan_keys() -> Iterator[tuple[str, str]]:
    from flora import FloraConfig

    return ((name, text) for name, text in _describe(FloraConfig) if text)


def _describe(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    types = get_type_hints(kind)
    for key in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[key.name]):
            yield from _describe(types[key.name], f"{prefix}{key.name}.")
        elif "help" in key.metadata:
            default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
            yield prefix + key.name, f"{key.metadata['help']} [{default}]"


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """`seed=1`, `--seed=1` and `--seed 1` all become `seed=1`; a `--fresh` without a value becomes `fresh=true`."""
    overrides = []
    for argument in arguments:
        key = argument.removeprefix("--")
        if argument.startswith("--") or "=" in key.lstrip("="):
            overrides.append(key)
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={argument}"
        else:
            raise Refused(f"{argument}: expected key=value")
    return [override if "=" in override else f"{override}=true" for override in overrides]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flora")
def main() -> None:
    """Fine-tune frozen models with low-rank core adapters, for weights of any number of dimensions."""


@main.command(cls=Keys, keys=train_keys, context_settings={"ignore_unknown_options": True})
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Run the job that the YAML file CONFIG describes.

    Any key can be set after it: `flora train configs/digits.yaml seed=1 training.epochs=3`, or `--seed 1`. An
    interrupted run goes on when it is started again. For several processes: `accelerate launch -m flora.cli train ...`.
    """
    with job_errors():
        from flora.job import train as run
        from flora.settings import load_config

        run(load_config(config, as_overrides(overrides)))


@main.command(cls=Keys, keys=train_keys, context_settings={"ignore_unknown_options": True})
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
    with job_errors():
        from flora.compare import compare as run
        from flora.settings import load_config

        run(load_config(config, [*as_overrides(overrides), *lists, *single]), methods.split(",") if methods else ())


@main.command()
@click.argument("folders", nargs=-1, required=True)
@click.option("--out", default=".", show_default=True, help="Folder for report.html, its figures and tables.")
def analyse(folders: tuple[str, ...], out: str) -> None:
    """Make one report of the comparisons in FOLDERS: tables and figures, in a page that needs no network."""
    with job_errors():
        from flora.analysis import analyse as run

        try:
            click.echo(str(run(folders, out)))
        except ValueError as error:  # what is no row
            raise Refused(str(error)) from error


@contextmanager
def job_errors() -> Iterator[None]:
    """What a person can mend is one line and exit code 2."""
    try:
        from flora.models import quiet
        from flora.settings import ConfigError

        quiet()
        try:
            yield
        except (ConfigError, OSError) as error:
            raise Refused(str(error)) from error
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: pip install 'flora-peft[train]'") from error


@main.command(cls=Keys, keys=plan_keys, context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def plan(model: str, overrides: tuple[str, ...]) -> None:
    """Show which weights of MODEL an adapter would train, at which ranks, and how many parameters that makes.

    MODEL is a transformers model: a folder with its config.json, or a name on the hub. No weights are loaded. Keys are
    the fields of FloraConfig: `flora plan MODEL budget=0.005`.
    """
    import flora
    from flora.models import quiet

    quiet()
    keys = {"target_modules": "all-weights", **_values(as_overrides(overrides))}
    known = {field.name for field in dataclasses.fields(flora.FloraConfig)}
    for key in keys:
        if key not in known:
            raise Refused(f"{key}: no field of FloraConfig; `flora plan --help` lists them")
    try:
        config = flora.FloraConfig(**keys)
        click.echo(str(flora.plan(_empty(model), config)))
    except (TypeError, ValueError) as error:
        raise Refused(" ".join(str(error).split())) from error


# -------------------------------------------------------------------------------------------------------- conversions


@main.group()
def export() -> None:
    """Write an adapter for other programs, which need no flora to read it."""


@main.group("import")
def import_() -> None:
    """Make a FLoRA adapter, exactly, of what another program has trained."""


def convert(name: str, sides: tuple[str | None, str, str, str], loading: dict | None = None, **arguments: Any) -> None:
    """Call ``flora.convert.NAME`` and print what it says; then, if there is a model, how far the sides' outputs are
    apart: (model or None, FLoRA side, other side, what that is), and what ``loading`` the other takes."""
    from flora import convert
    from flora.models import quiet

    quiet()
    try:
        click.echo(str(getattr(convert, name)(**arguments, progress=True)))
        if sides[0]:
            click.echo(str(convert.verify(*sides, **(loading or {}))))
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: pip install 'flora-peft[convert]'") from error


def two(first: str, second: str, help: str = "Load both sides onto MODEL and compare the outputs.") -> Callable:
    """The two paths of a conversion, and --verify."""

    def decorate(command: Callable) -> Callable:
        command = click.option("--verify", metavar="MODEL", help=help)(command)
        return click.argument(first)(click.argument(second)(command))

    return decorate


ENCODERS = (
    click.option("--text-encoder", metavar="ADAPTER", help="A second adapter, of the text encoder."),
    click.option("--text-encoder-2", metavar="ADAPTER", help="A third, of SDXL's second text encoder."),
)
SIZE = (
    click.option("--budget", help="Parameters of all layers together, or a share of the model's (0.005)."),
    click.option("--energy", type=float, help="The least share of the squared norm that each layer keeps."),
    click.option("--rank", type=int, help="One rank for every mode."),
)


def options(*some: Callable) -> Callable:
    return lambda command: reduce(lambda made, option: option(made), reversed(some), command)


@export.command("lora")
@two("adapter", "out")
@click.option("--ragged", is_flag=True, help="Each layer its own rank; else all get the largest, with zeros.")
@click.option("--merge-rest", metavar="BASE", help="Layers without a LoRA form: save them whole, merged into BASE's.")
def export_lora(adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """ADAPTER as a plain PEFT LoRA, in the folder OUT."""
    convert("export_lora", (verify, adapter, out, "lora"), adapter=adapter, out=out, **options)


@export.command("locon")
@two("adapter", "out")
@options(*ENCODERS)
@click.option("--prefix", help="What names begin with [lora_unet, lora_te or lycoris, by the model].")
@click.option("--folded", is_flag=True, help="Without `lora_mid`, for programs that do not know it.")
def export_locon(adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """ADAPTER as a LyCORIS / kohya LoCon, the file OUT: for ComfyUI, A1111, InvokeAI."""
    convert("export_locon", (verify, adapter, out, "locon"), adapter=adapter, out=out, **options)


@export.command("diffusers")
@two("adapter", "out")
@options(*ENCODERS)
@click.option("--component", help="The part of the pipeline that it is for [unet or transformer, by the model].")
def export_diffusers(adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """ADAPTER as OUT/pytorch_lora_weights.safetensors, for diffusers' load_lora_weights."""
    convert("export_diffusers", (verify, adapter, out, "diffusers"), adapter=adapter, out=out, **options)


@import_.command("lora")
@two("lora", "out")
@click.option("--is-transposed", is_flag=True, help="Stacked experts are (experts, in, out).")
def import_lora(lora: str, out: str, verify: str | None, **options: Any) -> None:
    """The PEFT LoRA in the folder LORA as a FLoRA adapter in the folder OUT."""
    convert("import_lora", (verify, out, lora, "lora"), lora=lora, out=out, **options)


@import_.command("locon")
@click.argument("file")
@click.argument("base")
@click.argument("out")
@click.option("--prefix", help="Of the names, where the file has several.")
@click.option("--verify", is_flag=True, help="Load both sides onto BASE and compare the outputs.")
def import_locon(file: str, base: str, out: str, verify: bool, prefix: str | None) -> None:
    """The LoCon FILE, of the model BASE, as a FLoRA adapter in the folder OUT."""
    sides = (base if verify else None, out, file, "locon")
    convert("import_locon", sides, file=file, base=_empty(base), out=out, prefix=prefix)


@import_.command("official")
@two("checkpoint", "out")
@click.option("--scale", type=float, required=True, help="The s that it was trained with; the file does not tell.")
@click.option("--prefix", help="What names begin with, before the model's own.")
@click.option("--save", multiple=True, metavar="LAYER", help="A layer to take over whole: a new head.")
def import_official(checkpoint: str, out: str, verify: str | None, **options: Any) -> None:
    """A checkpoint of the FLoRA authors' code as a FLoRA adapter in the folder OUT."""
    sides = (verify, out, checkpoint, "official")
    convert("import_official", sides, options, checkpoint=checkpoint, out=out, **options)


@main.command()
@click.argument("base")
@two("adapter", "out", "Load MODEL with the adapter, and OUT, and compare the outputs.")
@click.option("--max-shard-size", default="5GB", show_default=True)
def merge(base: str, adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """The model BASE with ADAPTER's updates in its weights, in the folder OUT."""
    convert("merge", (verify, adapter, out, "merged"), base=base, adapter=adapter, out=out, **options)


@main.command()
@click.argument("base")
@two("tuned", "out", "Load MODEL with the result, and TUNED, and compare the outputs.")
@options(*SIZE)
@click.option("--keep-rest/--drop-rest", default=True, show_default=True, help="What no core can hold, kept whole.")
def extract(base: str, tuned: str, out: str, verify: str | None, budget: str | None, **options: Any) -> None:
    """The difference of two checkpoints as a FLoRA adapter in the folder OUT, at the best ranks of a size."""
    sizes = {"budget": _number(budget), **options}
    convert("extract", (verify, out, tuned, "merged"), base=base, tuned=tuned, out=out, **sizes)


@main.command()
@two("adapter", "out")
@options(*SIZE)
def compress(adapter: str, out: str, verify: str | None, budget: str | None, **options: Any) -> None:
    """ADAPTER at smaller ranks, in the folder OUT."""
    sides = (verify, out, adapter, "flora")
    convert("compress", sides, adapter=adapter, out=out, budget=_number(budget), **options)


def _values(overrides: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    values = {}
    for override in overrides:
        try:
            values |= OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=True)
        except (OmegaConfBaseException, YAMLError) as error:
            raise Refused(f"{override}: {' '.join(str(error).split())}") from error
    return values


def _number(budget: str | None) -> int | float | None:
    try:
        return budget and (float(budget) if "." in budget or "e" in budget else int(budget.replace(",", "")))
    except ValueError:
        raise Refused(f"--budget {budget}: a whole number of parameters, or a share such as 0.005") from None


def _empty(name: str) -> Any:
    from flora.models import empty_model, quiet

    quiet()
    try:
        return empty_model(name)
    except ValueError as error:
        raise Refused(str(error)) from error


if __name__ == "__main__":
    main()
