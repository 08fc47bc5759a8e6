"""Whether the fields of a config hold what their annotations say: a file may hold anything."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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
