"""Commands that take `key=value` arguments, and the error that ends a command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_type_hints

import click


class Refused(click.ClickException):
    """A mistake of the user's."""

    exit_code = 2


class KeyedCommand(click.Command):
    """A command with `key=value` arguments after its options. Its help ends with the list of keys."""

    def __init__(self, name: str | None, *, keys: Callable[[], Iterator[tuple[str, str]]], **kwargs: Any) -> None:
        super().__init__(name, **kwargs, context_settings={"ignore_unknown_options": True})
        self.keys = keys  # called for the help only: importing what it lists takes seconds

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


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is YAML."""
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
    """Set keys["a"]["b"] to the value for the key "a.b"."""
    outer, _, inner = key.partition(".")
    if not inner:
        keys[outer] = value
    else:
        if not isinstance(keys.get(outer), dict):
            keys[outer] = {}
        set_nested(keys[outer], inner, value)
