"""Checks of a config's fields: a user, or a file, may give anything."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and neither a bool nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def is_rank(value: Any) -> bool:
    """Whether it is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# Each raises ValueError, naming the field, the value given and what is accepted.


def check_names(name: str, value: Any, regex: bool) -> None:
    """A list of names, None, or with ``regex`` a regex."""
    accepted = f"{name} must be a list of names{' or a regex' if regex else ''}"
    if regex and isinstance(value, str):
        check_regex(accepted, value)
    elif value is not None:
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{accepted}, got {value!r}")


def check_patterns(name: str, patterns: Any, check: Callable[[str, Any], None]) -> None:
    """A dictionary of regexes to values that pass ``check``."""
    accepted = f"{name} must have names or regexes as keys"
    if not isinstance(patterns, dict):
        raise ValueError(f"{accepted}, got {patterns!r}")
    for pattern, value in patterns.items():
        check_regex(accepted, pattern)
        check(f"{name}[{pattern!r}]", value)


def check_regex(accepted: str, value: Any) -> None:
    """A valid regular expression; ``accepted`` begins the message."""
    if not isinstance(value, str):
        raise ValueError(f"{accepted}, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{accepted}, got {value!r}: {error}") from error


def check_rank(name: str, value: Any, none: bool = False, many: bool = True) -> None:
    """A rank; with ``many`` also a list of ranks, with ``none`` also None."""
    if (none and value is None) or is_rank(value):
        return
    if many and isinstance(value, Sequence) and not isinstance(value, str) and value and all(map(is_rank, value)):
        return
    accepted = "a whole number from 1" + (", or a list of one per mode" if many else "")
    raise ValueError(f"{name} must be {accepted}, got {value!r}")


def check_budget(value: Any) -> None:
    """A number of parameters, a share of the model, or None."""
    if value is None or is_rank(value) or (isinstance(value, float) and 0 < value <= 1):
        return
    raise ValueError(
        f"budget must be a number of parameters (a whole number from 1) or a share of the model (a float in (0, 1]), "
        f"got {value!r}"
    )


def check_scale(name: str, value: Any) -> None:
    """ "auto" or a finite number other than 0."""
    if value != "auto" and not (is_number(value) and abs(value) != float("inf") and value != 0):
        raise ValueError(f"{name} must be 'auto' or a finite number other than 0, got {value!r}")


def check_scales(scales: Any) -> None:
    """A dictionary of names to numbers, or None."""
    if scales is None:
        return
    if not isinstance(scales, dict) or not all(isinstance(key, str) and is_number(s) for key, s in scales.items()):
        raise ValueError(f"scales must be None or a dictionary of weights' names to numbers, got {scales!r}")


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """One of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_types(config: Any, without: Collection[str] = ()) -> None:
    """Raise ValueError, naming field, value and what is accepted, if a field of a dataclass has another type.

    Args:
        without: fields that have checks of their own.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if field.name not in without and not _fits(value, hint):
            accepted = field.type if isinstance(field.type, str) else str(hint).replace("typing.", "")
            raise ValueError(f"{field.name} must be {accepted}, got {value!r:.200}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Any or hint is dataclasses.MISSING:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return isinstance(value, (str, int, type(None))) and value in arguments
    if origin is float or origin is int:
        return isinstance(value, (int, float) if origin is float else int) and not isinstance(value, bool)
    if origin in (list, set, tuple):  # JSON has lists only, and users give whichever they like
        element = arguments[0] if arguments and origin is not tuple else Any
        return isinstance(value, (list, set, tuple, frozenset)) and all(_fits(one, element) for one in value)
    if origin is dict:
        key, element = arguments or (Any, Any)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(one, element) for k, one in value.items())
    if isinstance(origin, type) and (dataclasses.is_dataclass(origin) or issubclass(origin, Enum)):
        return isinstance(value, (origin, dict, str))  # PEFT converts them
    return not isinstance(origin, type) or isinstance(value, origin)
