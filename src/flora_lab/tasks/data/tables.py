"""Files of comma-separated or tab-separated values, row by row."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_table(file: Path, text: str) -> list[tuple[str, Any]]:
    """Every row as {column: text}, with its place. The first line has the columns' names; fields may be quoted.

    Raises ValueError naming file and line.
    """
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATORS[file.suffix.lower()], strict=True)
    columns, rows = None, []
    try:
        for fields in lines:
            if columns is None:
                columns = fields
            elif fields:  # else it is a blank line
                place = f"{file}, line {lines.line_num}"
                if len(fields) != len(columns):
                    raise ValueError(f"{place}: {len(fields)} fields, expected {len(columns)}: {', '.join(columns)}")
                rows.append((place, dict(zip(columns, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{file}, line {lines.line_num}: {error}") from error
    return rows
