"""Rows read from results.jsonl files. No torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flora_lab.analysis.fields import Row, from_disk, on_disk

RESULTS = "results.jsonl"
CONSISTENT = {  # key: the rows in which it must have one value
    "metric": ("job",),
    "settings": ("job",),
    "method": ("job", "variant"),
    "options": ("job", "variant"),
}
TRIAL = ("job", "variant", "budget", "seed", "learning_rate")


def read(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of files, or of every results.jsonl in or below folders. If a trial is there twice, the last row counts.

    A last line that was cut short (the process was killed) is dropped with a warning. Raises ValueError, naming file
    and line, for any other line that is not a valid row, and for a row that contradicts an earlier one (`CONSISTENT`);
    also if there is nothing to read.
    """
    files = [file for path in paths for file in _files(Path(path))]
    trials: dict[tuple, Row] = {}
    first: dict[tuple, tuple[Any, str]] = {}
    for file in files:
        for where, row in _rows(file):
            for key, scope in CONSISTENT.items():
                _check_consistent(row, key, scope, where, first)
            row["method"] = row.get("method") or row["variant"]  # older rows have none
            trial = tuple(row.get(key) for key in TRIAL)
            trials.pop(trial, None)
            trials[trial] = row
    if not trials:
        raise ValueError(f"no rows in {', '.join(map(str, files))}")
    return list(trials.values())


def _files(path: Path) -> list[Path]:
    files = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: " + (f"no {RESULTS} in or below it" if path.is_dir() else "no such file or folder"))
    return files


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Each row and its place, "FILE, line N"."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file: {error}") from error
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{where}: incomplete JSON ({error})") from error
            warnings.warn(f"{where}: cut short, left out", stacklevel=3)
        else:
            yield where, from_disk(content, where)


def _check_consistent(
    row: Row, key: str, scope: tuple[str, ...], where: str, first: dict[tuple, tuple[Any, str]]
) -> None:
    """``first``: the first value of each key and scope, and its place. A row without the key, an older one, passes."""
    if row.get(key) is None:
        return
    value, place = first.setdefault((key, *(row[name] for name in scope)), (row[key], where))
    if row[key] != value:
        subject = ", ".join(f"{on_disk(name)} {row[name]!r}" for name in scope)
        raise ValueError(
            f"{where}: {on_disk(key)}={row[key]!r} for {subject}, but {value!r} in {place}: these rows are of "
            "different jobs or variants with one name; analyse them separately, or rename one output folder or variant"
        )
