"""What commands are made of: groups, `key=value` arguments, the error that ends a command, a time limit."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from typing import Any, get_type_hints

import click

from flora.text import did_you_mean


class Refused(click.ClickException):
    """A mistake of the user's."""

    exit_code = 2


class Commands(click.Group):
    """The commands below, and those that installed packages add by entry point.

    Args:
        sections: of the help: a heading, and the names of its commands. Others come last.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections or {}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        present = self.list_commands(ctx)
        named = {name for names in self.sections.values() for name in names}
        others = [name for name in present if name not in named]
        for heading, names in (*self.sections.items(), ("Further commands" if named else "Commands", others)):
            rows = [(name, command) for name in names if name in present and (command := self.get_command(ctx, name))]
            if rows:
                with formatter.section(heading):
                    limit = formatter.width - 6 - max(len(name) for name, _ in rows)
                    formatter.write_dl([(name, command.get_short_help_str(limit)) for name, command in rows])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *entry_points(group="flora.commands").names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own or next((command.load() for command in entry_points(group="flora.commands", name=cmd_name)), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(ctx)) or f": {', '.join(self.list_commands(ctx))}"
            raise Refused(f"no such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


class ListingCommand(click.Command):
    """A command whose help ends with a list of names, each with what it is."""

    def __init__(
        self, name: str | None, *, heading: str, rows: Callable[[], Iterable[tuple[str, str]]], **kwargs: Any
    ) -> None:
        super().__init__(name, **kwargs)
        self.heading, self.rows = heading, rows  # called for the help only: importing what they list takes seconds

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(self.heading):
            formatter.write_dl(list(self.rows()))


class KeyedCommand(ListingCommand):
    """A command with `key=value` arguments after its options. Its help ends with the list of keys."""

    def __init__(self, name: str | None, *, keys: Callable[[], Iterator[tuple[str, str]]], **kwargs: Any) -> None:
        ignore = {"ignore_unknown_options": True}
        super().__init__(name, heading="Keys [default]", rows=keys, **kwargs, context_settings=ignore)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's. Raises Refused for an option where the first argument belongs."""
        first = next(param for param in self.params if isinstance(param, click.Argument))
        value = str(ctx.params[first.name or ""])
        if value.startswith("-"):
            name, key = (first.name or "").upper(), value.lstrip("-").partition("=")[0]
            raise Refused(f"{value}: {name} comes first, as in `{ctx.command_path} {name} {key}=VALUE`")
        return super().invoke(ctx)


def described_keys(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, help and default) for every documented field of a dataclass, nested ones included."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            yield from described_keys(types[field.name], f"{prefix}{field.name}.")
        elif "help" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield prefix + field.name, f"{field.metadata['help']} [{default}]"


def flags(config: type, prefix: str = "") -> Iterator[str]:
    """The keys of a dataclass, nested ones included, that are true or false."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            yield from flags(types[field.name], f"{prefix}{field.name}.")
        elif types[field.name] is bool:
            yield prefix + field.name


def as_overrides(arguments: Sequence[str], flags: Callable[[], Iterable[str]] | None = None) -> list[str]:
    """`seed=1`, `--seed=1` and `--seed 1` all become `seed=1`; a `--fresh` without a value becomes `fresh=true`.

    Args:
        flags: returns the keys that need no value; by default all.

    Raises:
        Refused: for another argument, or another key without a value.
    """
    overrides: list[str] = []
    for argument in arguments:
        key = argument.removeprefix("--")
        if argument.startswith("--") or "=" in key.lstrip("="):
            overrides.append(key)
        elif overrides and "=" not in overrides[-1]:
            overrides[-1] += f"={argument}"
        else:
            raise Refused(f"{argument}: expected key=value")
    bare = [override for override in overrides if "=" not in override]
    if bare and flags and (missing := sorted({*bare} - {*flags()})):
        raise Refused(f"--{missing[0]}: expected a value, as in {missing[0]}=VALUE")
    return [override if "=" in override else f"{override}=true" for override in overrides]


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is YAML."""
    import yaml

    key, _, text = override.partition("=")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Refused(f"{override:.200}: {' '.join(str(error).split())}") from error
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


# far above what any model takes: only a hostile regex reaches it
PATTERN_SECONDS = 60.0
SLOW_PATTERN = "matching target_modules, exclude_modules and the other patterns takes too long: give simpler ones"


def pattern_limit() -> AbstractContextManager[None]:
    """The time that a user's regexes may take on the names of a model."""
    return time_limit(PATTERN_SECONDS, SLOW_PATTERN)


class _TimeIsUp(BaseException):
    """Not an Exception: a model's own code may catch those."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise Refused with ``message`` after some seconds. It interrupts a regular expression, too.

    Only where a signal can tell the time: in the main thread, not on Windows.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUp:
        raise Refused(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
