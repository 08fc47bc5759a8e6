"""The `flora` command: each subcommand is one call. A mistake is one line that names it, and exit code 2.

Other packages add commands through the entry point group `flora.commands`. Nothing heavy is imported before a command
runs, so that help and a typo answer at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from importlib.metadata import entry_points
from typing import Any, get_type_hints

import click

from flora import __version__


class Refused(click.ClickException):
    exit_code = 2


class Commands(click.Group):
    """The commands below, and those that installed packages add by entry point."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *entry_points(group="flora.commands").names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        added = entry_points(group="flora.commands", name=cmd_name)
        return super().get_command(ctx, cmd_name) or next((command.load() for command in added), None)


class KeyedCommand(click.Command):
    """A command with `key=value` arguments after its options. Its help ends with the list of keys."""

    def __init__(self, name: str | None, *, keys: Callable[[], Iterator[tuple[str, str]]], **kwargs: Any) -> None:
        super().__init__(name, **kwargs, context_settings={"ignore_unknown_options": True})
        self.keys = keys  # called only for the help: what it lists takes seconds to import

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Keys [default]"):
            formatter.write_dl(list(self.keys()))


def described_keys(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, help and default) for every documented field of a dataclass, nested ones included."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            yield from described_keys(types[field.name], f"{prefix}{field.name}.")
        elif "help" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield prefix + field.name, f"{field.metadata['help']} [{default}]"


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """`seed=1`, `--seed=1` and `--seed 1` all become `seed=1`; a `--fresh` without a value becomes `fresh=true`."""
    overrides: list[str] = []
    for argument in arguments:
        key = argument.removeprefix("--")
        if argument.startswith("--") or "=" in key.lstrip("="):
            overrides.append(key)
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={argument}"
        else:
            raise Refused(f"{argument}: expected key=value")
    return [override if "=" in override else f"{override}=true" for override in overrides]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flora")
def main() -> None:
    """Fine-tune frozen models with low-rank core adapters, for weights of any number of dimensions."""


# ---------------------------------------------------------------------------------------------------------------- plan


def plan_keys() -> Iterator[tuple[str, str]]:
    from flora import FloraConfig

    return ((name, text) for name, text in described_keys(FloraConfig) if text)


@main.command(cls=KeyedCommand, keys=plan_keys)
@click.argument("model")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def plan(model: str, overrides: tuple[str, ...]) -> None:
    """Show which weights of MODEL an adapter would train, at which ranks, and how many parameters that makes.

    MODEL is a transformers or diffusers model: a folder with its config.json, or a name on the hub. No weights are
    loaded. Keys are the fields of FloraConfig: `flora plan MODEL budget=0.005`.
    """
    given = [parsed(override) for override in as_overrides(overrides)]

    import flora
    from flora.models import quiet

    quiet()
    keys: dict[str, Any] = {"target_modules": "all-weights"}
    known = {field.name for field in dataclasses.fields(flora.FloraConfig)}
    for key, value in given:
        if key.partition(".")[0] not in known:
            raise Refused(f"{key}: no field of FloraConfig; `flora plan --help` lists them")
        set_nested(keys, key, value)
    try:
        config = flora.FloraConfig(**keys)
        click.echo(str(flora.plan(_empty(model), config)))
    except (TypeError, ValueError) as error:
        raise Refused(" ".join(str(error).split())) from error


def parsed(override: str) -> tuple[str, Any]:
    """`key=value`, the value read as YAML."""
    import yaml

    key, _, text = override.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"{override}: {' '.join(str(error).split())}") from error
    if isinstance(value, str):  # PyYAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            pass
    return key, value


def set_nested(keys: dict[str, Any], key: str, value: Any) -> None:
    """keys["a"]["b"] = value for the key "a.b"."""
    outer, _, inner = key.partition(".")
    if not inner:
        keys[outer] = value
    else:
        if not isinstance(keys.get(outer), dict):
            keys[outer] = {}
        set_nested(keys[outer], inner, value)


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
    model, ours, other, form = sides
    try:
        click.echo(str(getattr(convert, name)(**arguments, progress=True)))
        if model:
            click.echo(str(convert.verify(model, ours, other, form, **(loading or {}))))
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


def _number(budget: str | None) -> int | float | None:
    try:
        if budget is None:
            return None
        return float(budget) if "." in budget or "e" in budget else int(budget.replace(",", ""))
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
    from flora.cli import main as command  # added commands import this module by its name

    command()
