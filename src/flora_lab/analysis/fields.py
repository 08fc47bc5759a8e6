"""The keys of a row: their names in memory and on disk, and the values that are accepted. No torch.

A row is what one trial leaves in results.jsonl, or says why a variant was left out. Three keys are older on disk than
the words that the code uses for them (`ON_DISK`); only this module knows the names on disk.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
ON_DISK = {"job": "task", "variant": "method", "method": "way"}  # in memory: in results.jsonl
IN_MEMORY = {disk: memory for memory, disk in ON_DISK.items()}

SUBJECT = ("job", "metric", "variant", "budget")  # required of every row
OUTCOME = ("seed", "learning_rate", "validation", "test", "adapter_parameters", "head_parameters")  # of a trial's row


def to_disk(row: Row) -> dict[str, Any]:
    return {on_disk(key): value for key, value in row.items()}


def from_disk(content: Any, where: str) -> Row:
    """The row that a line of results.jsonl holds. Raises ValueError, starting with ``where``, if it is not valid."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, got a {type(content).__name__}")
    row = {IN_MEMORY.get(key, key): value for key, value in content.items()}
    check(row, where)
    return row


def on_disk(key: str) -> str:
    """The name that a key has in results.jsonl."""
    return ON_DISK.get(key, key)


def check(row: Row, where: str) -> None:
    """Raise ValueError, starting with ``where``, if a required key is missing or a value is not accepted.

    An optional key may be null. Unknown keys may hold anything.
    """
    required = (*SUBJECT, "left_out") if "left_out" in row else (*SUBJECT, *OUTCOME)
    for key in required:
        if key not in row:
            raise ValueError(f"{where}: missing key {on_disk(key)!r}")
    for expected, (keys, accepts) in ACCEPTED.items():
        for key in keys:
            absent = row.get(key) is None and key not in required
            if not (absent or accepts(row[key])):
                raise ValueError(f"{where}: {on_disk(key)}={row[key]!r:.80}; expected {expected}")
    for split in ("validation", "test") if "left_out" not in row else ():
        metric, numbers = row["metric"], row[split]
        if not (isinstance(numbers, dict) and _number(numbers.get(metric))):
            raise ValueError(f"{where}: {split}={numbers!r:.80}; expected an object with a number at {metric!r}")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)  # NaN included: the trial diverged


def _above_zero(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _list(each: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(each, value))


def _jpeg(value: Any) -> bool:
    try:
        return _text(value) and base64.b64decode(value, validate=True).startswith(b"\xff\xd8")
    except ValueError:
        return False


def _samples(value: Any) -> bool:
    if not isinstance(value, dict) or not _list(_text)(value.get("prompts")):
        return False
    return all(_list(_jpeg, len(value["prompts"]))(value.get(name)) for name in ("images", "base"))


TIMES = ("seconds", "train_seconds", "epoch_seconds")
MEMORY = ("memory", "memory_reserved", "memory_reserved_mean")

ACCEPTED: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "a string": (("job", "metric", "variant", "method", "settings", "left_out", "machine"), _text),
    "a whole number": (("seed", "adapter_parameters", "head_parameters"), _whole),
    "a whole number or null": (("budget",), lambda value: value is None or _whole(value)),
    "a number above 0": (("learning_rate",), _above_zero),
    "a number": (("epochs", "train_loss", *TIMES, *MEMORY), _number),
    "an object": (("options",), lambda value: isinstance(value, dict)),
    "a list of strings": (("notes",), _list(_text)),
    "a list of pairs of numbers": (("curve",), _list(_list(_number, 2))),
    "a list of three numbers each": (("norms",), _list(_list(_number, 3))),
    "an object of lists of numbers": (
        ("spectra",),
        lambda value: isinstance(value, dict) and all(map(_list(_number), value.values())),
    ),
    "prompts with as many images and base, JPEGs in base64": (("samples",), _samples),
}
