"""What a row may hold: the keys that tables and figures read, and what is accepted of each. Plain rows, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
SUBJECT = ("task", "metric", "method", "budget")  # of a method that was left out, too
RAN = ("seed", "learning_rate", "validation", "test", "adapter_parameters", "head_parameters")


def check(row: Any, where: str) -> None:
    """Raises ValueError for what is no row: one that lacks a key, or has a value that is not accepted. A key that is
    not needed may be null; one that is not read may hold anything."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}; a JSON object is needed")
    needed = (*SUBJECT, "left_out") if "left_out" in row else (*SUBJECT, *RAN)
    for key in needed:
        if key not in row:
            raise ValueError(f"{where}: no {key!r}")
    for what, (keys, accepted) in ACCEPTED.items():
        for key in keys:
            missing = row.get(key) is None and key not in needed
            if not (missing or accepted(row[key])):
                raise ValueError(f"{where}: {key}={row[key]!r:.80}; expected {what}")
    for split in ("validation", "test") if "left_out" not in row else ():
        metric, found = row["metric"], row[split]
        if not (isinstance(found, dict) and _number(found.get(metric))):
            raise ValueError(f"{where}: {split}={found!r:.80}; expected an object with a number at {metric!r}")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)  # NaN too: a run that diverged


def _above_zero(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _list(each: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(each, value))


ACCEPTED: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "a string": (("task", "metric", "method", "way", "settings", "left_out", "machine"), _text),
    "a whole number": (("seed", "adapter_parameters", "head_parameters"), _whole),
    "a whole number or null": (("budget",), lambda value: value is None or _whole(value)),
    "a number above 0": (("learning_rate",), _above_zero),
    "a number": (("epochs", "seconds", "epoch_seconds", "memory"), _number),
    "an object": (("options",), lambda value: isinstance(value, dict)),
    "a list of strings": (("notes",), _list(_text)),
    "a list of pairs of numbers": (("curve",), _list(_list(_number, 2))),
    "a list of three numbers each": (("norms",), _list(_list(_number, 3))),
    "an object of lists of numbers": (
        ("spectra",),
        lambda value: isinstance(value, dict) and all(map(_list(_number), value.values())),
    ),
}
