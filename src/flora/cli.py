"""The `flora` command: `train` and `plan`, each one call. A mistake is one line that names it, and exit code 2."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    for key in dataclasses.fields(kind):
        if dataclasses.is_dataclass(key.type):
            yield from _describe(key.type, f"{prefix}{key.name}.")
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
    from flora.settings import ConfigError, load_config

    try:
        settings = load_config(config, as_overrides(overrides))
        from flora.job import run

        _quiet()
        run(settings)
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

    _quiet()
    keys = {"target_modules": "all-weights", **_values(as_overrides(overrides))}
    known = {field.name for field in dataclasses.fields(flora.FloraConfig)}
    for key in keys:
        if key not in known:
            raise Refused(f"{key}: no field of FloraConfig; `flora plan --help` lists them")
    try:
        config = flora.FloraConfig(**keys)
        click.echo(str(flora.plan(_empty_model(model), config)))
    except (TypeError, ValueError) as error:
        raise Refused(" ".join(str(error).split())) from error


def _quiet() -> None:
    """Leave the screen to our own bars, tables and errors."""
    import warnings

    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PEFT 0.21 reads a property that transformers 5 has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


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


def _empty_model(name: str) -> Any:
    """The model on the meta device, from its config alone, as the class that the config names."""
    import torch
    import transformers

    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise Refused(f"{name}: no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Refused(f"{name}: {' '.join(str(error).split())}") from error
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return kind(config) if kind else transformers.AutoModel.from_config(config)


if __name__ == "__main__":
    main()
