"""Where examples come from (a folder, parquet files, the hub: `datasets` reads them all), how they are split in three,
and what is wrong with them, by file and row, before anything is trained."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


@dataclass
class Portions:
    """How a source's examples make three splits. A source's own are taken as they are; one that has no test split
    beside train and validation is tested on the latter, and validation is held out of train."""

    test_share: float = field(default=0.2, metadata={"help": "to test on, of a source with one split only"})
    validation_share: float = field(default=0.1, metadata={"help": "to tune on, of train, where there is no split"})
    train_examples: int | None = field(default=None, metadata={"help": "so many at the most", "least": 1})
    validation_examples: int | None = field(default=None, metadata={"help": "so many at the most", "least": 1})
    test_examples: int | None = field(default=None, metadata={"help": "so many at the most", "least": 1})

    def __post_init__(self):
        for name in ("test_share", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"task.data.{name}={getattr(self, name)}: expected a share between 0 and 1")


@dataclass
class Pictures(Portions):
    """Portions of a source of pictures, and how their channels are normalised: ImageNet's by default."""

    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406], metadata={"help": "of each channel"})
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225], metadata={"help": "of each channel"})

    def __post_init__(self):
        super().__post_init__()
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or min(self.std) <= 0:
            raise ValueError(
                f"task.data.mean={self.mean} and task.data.std={self.std}: expected one or three numbers each, "
                "the latter above 0"
            )


@dataclass
class Table:
    """A ``datasets.Dataset``, and how to name one of its rows to a person."""

    rows: Any
    name: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def select(self, indices: Iterable[int]) -> Table:
        indices = list(indices)
        return Table(self.rows.select(indices), lambda index: self.name(indices[index]))


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str, images: Iterable[str] = ()) -> dict[str, Table]:
    """Splits by name: of a parquet file, a folder of such, a folder of images (one folder a class), or the hub.

    ``images`` are the columns of pictures: left encoded, as {"bytes", "path"}. Raises ValueError naming ``path``.
    """
    import datasets

    datasets.disable_progress_bars()
    place = Path(path)
    try:
        if files := sorted(place.rglob("*.parquet")) if place.is_dir() else [place] * (place.suffix == ".parquet"):
            tables = _parquet(files)
        elif place.is_dir():
            found = datasets.load_dataset("imagefolder", data_dir=path)
            tables = {name: Table(rows, _namer(path, name)) for name, rows in found.items()}
        elif path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ValueError("no such file or folder")
        else:
            tables = {name: Table(rows, _namer(path, name)) for name, rows in datasets.load_dataset(path).items()}
    except Exception as error:  # of pyarrow's, the hub's and datasets' many classes
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    for table in tables.values():
        for column in set(images) & set(table.rows.column_names):
            if not isinstance(table.rows.features[column], datasets.Image):
                raise ValueError(f"{path}: column {column!r} holds {table.rows.features[column]}, no images")
            table.rows = table.rows.cast_column(column, datasets.Image(decode=False))
    return {split_name(name): table for name, table in tables.items()}


def _parquet(files: list[Path]) -> dict[str, Table]:
    import datasets

    names: dict[str, list[Path]] = {}
    for file in files:
        names.setdefault(re.split(r"[-_.]", file.stem)[0] if len(files) > 1 else "train", []).append(file)
    tables = {}
    for name, some in names.items():
        parts = [_one_parquet(file) for file in some]
        places = [f"{file}, row {row}" for file, part in zip(some, parts, strict=True) for row in range(len(part))]
        tables[name] = Table(datasets.concatenate_datasets(parts), places.__getitem__)
    return tables


def _one_parquet(file: Path) -> Any:
    import datasets
    from pyarrow.parquet import ParquetFile

    try:
        if ParquetFile(file).metadata.num_rows:
            return datasets.Dataset.from_parquet(str(file))
    except Exception as error:
        raise ValueError(f"{file.name}: {error}") from error
    raise ValueError(f"{file.name} is empty")


def _namer(path: str, split: str) -> Callable[[int], str]:
    return lambda index: f"{path}, {split}, row {index}"


def split_name(name: str) -> str:
    """One of `SPLITS` for what sources call it; another name as it is."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), name)


# --------------------------------------------------------------------------------------------------------- checking


def need_columns(tables: dict[str, Table], *columns: str) -> None:
    for split, table in tables.items():
        for column in columns:
            if column not in table.rows.column_names:
                raise ValueError(
                    f"{_source(table, split)} has no column {column!r}, but {', '.join(table.rows.column_names)}"
                )


def _source(table: Table, split: str) -> str:
    return table.name(0).rpartition(", row")[0] if len(table) else f"the {split} split"


def open_image(table: Table, index: int, column: str) -> Any:
    """The picture of a row, decoded by Pillow. Raises ValueError naming the row and, if it has one, its file."""
    from PIL import Image

    found = table.rows[index][column] or {}
    try:
        picture = Image.open(io.BytesIO(found.get("bytes") or Path(found.get("path") or "").read_bytes()))
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = f" ({found['path']})" if found.get("path") else ""
        raise ValueError(f"{table.name(index)}{where}: column {column!r} is no readable image: {error}") from error
    return picture


def check_each(tables: Iterable[Table], check: Callable[[Table, int], Any]) -> None:
    """``check`` every row of every table, several at a time; the first one's ValueError is raised."""
    with ThreadPoolExecutor(8) as threads:
        for table in tables:
            for _ in threads.map(partial(check, table), range(len(table))):
                pass


def need_known(splits: dict[str, Table], column: str, spelled: Callable[[int], str]) -> None:
    """Every class of a split must be in train: what is never shown is not learned. Raises ValueError naming the row."""
    known = set(splits["train"].rows[column][:])
    for table in splits.values():
        for index, label in enumerate(table.rows[column][:]):
            if label not in known:
                raise ValueError(f"{table.name(index)}: {spelled(label)} is not in the train split")


# -------------------------------------------------------------------------------------------------------- splitting


def three(tables: dict[str, Table], keys: Portions, seed: int, source: str) -> dict[str, Table]:
    """ "train", "validation" and "test", drawn by ``seed`` where the source has not split them itself."""
    if "train" not in tables:
        raise ValueError(f"{source} has no train split, but {', '.join(tables)}")
    found = {name: table for name, table in tables.items() if name in SPLITS}
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    train, whole = found["train"], len(found["train"])
    order = _order(whole, seed)
    cut = 0
    for name, share in (("test", keys.test_share), ("validation", keys.validation_share)):
        if name not in found:
            size = round(whole * share)
            found[name] = train.select(order[cut : cut + size])
            cut += size
    if cut:
        found["train"] = train.select(order[cut:])
    splits = {}
    for name in SPLITS:
        most, table = getattr(keys, f"{name}_examples"), found[name]
        if most is not None and most < len(table):
            table = table.select(_order(len(table), seed)[:most])
        if not len(table):
            raise ValueError(f"{source}: the {name} split is empty")
        splits[name] = table
    return splits


def _order(count: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
