"""Rows of columns: read from JSON lines, JSON, CSV, TSV, parquet or the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.files import hub_failure, local_path
from flora_lab.tasks.data.arithmetic import ARITHMETIC, problems
from flora_lab.tasks.data.records import SPLITS, Portions, Records, split_name
from flora_lab.tasks.data.tables import SEPARATORS, read_table
from flora_lab.tasks.data.texts import lines_of, parse_json, read_text

ENDINGS = (".jsonl", ".json", ".parquet", *SEPARATORS)


@dataclass
class Rows(Portions):
    """Where the rows come from."""

    path: str = field(
        default="",
        metadata={
            "help": "JSON lines, JSON, CSV, TSV or parquet: a file, a folder of splits, or a name on the hub",
            "path": True,
        },
    )
    subset: str | None = field(default=None, metadata={"help": "of a data set on the hub"})

    def read(self) -> dict[str, Records]:
        """The rows of "train", and of "validation" and "test" where the source has them. Raises ValueError."""
        if not self.path:
            raise ValueError("task.data.path: expected a file, a folder, or a name on the hub")
        return read_rows(self.path, self.subset)


def read_rows(path: str, subset: str | None) -> dict[str, Records]:
    """Raises ValueError naming ``path``, or file and line."""
    import datasets

    datasets.disable_progress_bars()
    if path in ARITHMETIC:
        return {"train": Records(problems(ARITHMETIC[path]), lambda index: f"{path}, row {index}")}
    place = local_path(path)
    if place is None:
        try:
            found = datasets.load_dataset(path, subset)
        except Exception as error:  # of the hub's and datasets' many classes
            raise ValueError(hub_failure(path, error)) from error
        splits = {split_name(name): Records(rows, _namer(f"{path}, {name}")) for name, rows in found.items()}
    else:
        splits = _files(place)
    if "train" not in splits and set(splits) != {"test"}:
        raise ValueError(f"{path} has no train split, but {', '.join(splits)}")
    return splits


def _files(place: Path) -> dict[str, Records]:
    """A split's files have its name, or lie in a folder of its name; a file with another name is train."""
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in ENDINGS)
    if not files:
        raise ValueError(f"{place}: no file that ends in {', '.join(ENDINGS)}")
    rows: dict[str, list] = {}
    places: dict[str, list[str]] = {}
    for file in files:
        names = (re.split(r"[-_.]", file.stem)[0], file.absolute().parent.name) if len(files) > 1 else ()
        split = next((split for split in map(split_name, names) if split in SPLITS), "train")
        for where, row in rows_of(file):
            rows.setdefault(split, []).append(row)
            places.setdefault(split, []).append(where)
    if not rows:
        raise ValueError(f"{place} is empty")
    return {split: Records(rows[split], places[split].__getitem__) for split in rows}


def rows_of(file: Path) -> list[tuple[str, Any]]:
    """Every row of a file with one of `ENDINGS`, with its place. Raises ValueError naming the file, and its line."""
    if file.suffix == ".parquet":
        return _parquet(file)
    text = read_text(file)
    if file.suffix in SEPARATORS:
        return read_table(file, text)
    if text.lstrip().startswith("["):
        return [(f"{file}, row {index}", row) for index, row in enumerate(parse_json(text, file))]
    return [(place, parse_json(line, place)) for place, line in lines_of(text, file)]


def _parquet(file: Path) -> list[tuple[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except Exception as error:  # of pyarrow's many classes
        raise ValueError(f"{file}: {error}") from error
    return [(f"{file}, row {index}", row) for index, row in enumerate(rows)]


def _namer(source: str) -> Any:
    return lambda index: f"{source}, row {index}"
