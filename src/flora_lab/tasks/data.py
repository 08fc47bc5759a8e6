"""Examples of any kind: tables whose rows have a name, how they are split in three, and what is wrong with them, by
file and row, before anything is trained. Of pictures in particular: `pictures`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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


def split_name(name: str) -> str:
    """One of `SPLITS` for what sources call it; another name as it is."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), name)


def is_place(path: str) -> bool:
    """Whether it can only be meant as a file or folder: the hub's names are NAME or OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


# --------------------------------------------------------------------------------------------------------- checking


def need_columns(tables: dict[str, Table], *columns: str) -> None:
    for split, table in tables.items():
        for column in columns:
            if column not in table.rows.column_names:
                raise ValueError(
                    f"{source_of(table, split)} has no column {column!r}, but {', '.join(table.rows.column_names)}"
                )


def source_of(table: Table, split: str) -> str:
    """What its rows lie in, or the first of them."""
    return table.name(0).rsplit(", row", 1)[0] if len(table) else f"the {split} split"


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
