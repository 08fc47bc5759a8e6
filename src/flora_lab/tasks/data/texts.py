"""Text files that users bring: UTF-8, with or without a byte order mark. Every error names the file, and its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    r"""The whole text; its lines end in \n. Raises ValueError naming the file, and the line that is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: {error.reason}; expected UTF-8") from error


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """`lines_of` a file. Raises ValueError as `read_text`."""
    return lines_of(read_text(file), file)


def lines_of(text: str, file: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, after its place, "FILE, line N"."""
    # not splitlines: it also cuts at U+2028 and the like, which may stand in JSON's texts
    lines = enumerate(text.split("\n"), 1)
    return ((f"{file}, line {number}", line) for number, line in lines if line.strip())


def parse_json(text: str, place: Any) -> Any:
    """Raises ValueError naming ``place``, a file or a line of it."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
