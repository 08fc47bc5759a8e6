"""Examples of any kind: records that can be named to a user, split in three, and checked before any training."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from flora_lab.lines import counted

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = {  # and what sources call them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


@dataclass
class Portions:
    """How a source's examples make three splits.

    The source's own splits are used as they are. If it has train and validation but no test split, its validation split
    becomes the test split, and a new validation split is taken from train.

    Attributes:
        few: what else to do, in words, if there are too few examples to take some away.
    """

    few: ClassVar[str] = ""

    test_share: float = field(default=0.2, metadata={"help": "share of train for testing, if there is no such split"})
    validation_share: float = field(default=0.1, metadata={"help": "share of train for validation, likewise"})
    train_examples: int | None = field(default=None, metadata={"help": "at most so many", "least": 1})
    validation_examples: int | None = field(default=None, metadata={"help": "at most so many", "least": 1})
    test_examples: int | None = field(default=None, metadata={"help": "at most so many", "least": 1})

    def __post_init__(self):
        for name in ("test_share", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"task.data.{name}={getattr(self, name)}: expected a share between 0 and 1")


@dataclass
class Records:
    """A ``datasets.Dataset`` or a list, and for each of its rows the name under which a user finds it: file and line,
    say. ``place``: a row's number in its source, in whose order rows are checked."""

    dataset: Any
    name: Callable[[int], str]
    place: Callable[[int], int] = operator.index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def select(self, indices: Iterable[int]) -> Records:
        indices = list(indices)
        rows = self.dataset
        some = [rows[index] for index in indices] if isinstance(rows, list) else rows.select(indices)
        return Records(some, lambda index: self.name(indices[index]), lambda index: self.place(indices[index]))


def split_name(name: str) -> str:
    """The key in `SPLITS` for a source's name of a split; any other name as it is."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), name)


# ------------------------------------------------------------------------------------------------------------ checking


def need_columns(splits: dict[str, Records], *columns: str) -> None:
    """Raise ValueError if a split lacks a column."""
    for split, records in splits.items():
        names = records.dataset.column_names
        for column in columns:
            if column not in names:
                raise ValueError(f"{source_of(records, split)} has no column {column!r}, but {', '.join(names)}")


def source_of(records: Records, split: str) -> str:
    """The file or split that the first record is in."""
    return records.name(0).rsplit(", row", 1)[0] if len(records) else f"the {split} split"


def check_each(splits: Iterable[Any], check: Callable[[Any, int], Any]) -> None:
    """Call ``check`` on every record of `Records`, or of what has their length and ``place``, several at a time, and
    show how many are done.

    The ValueError of the first in the source that fails is raised.
    """
    every = [(records.place(index), records, index) for records in splits for index in range(len(records))]
    every.sort(key=operator.itemgetter(0))
    with ThreadPoolExecutor(8) as threads:
        for _ in counted(threads.map(lambda one: check(*one[1:]), every), len(every), "checking"):
            pass


def need_known(splits: dict[str, Records], column: str, spell: Callable[[int], str]) -> None:
    """Raise ValueError, naming the record, if a split has a class that train lacks: it could not be learned.

    ``spell``: a class in words.
    """
    known = set(splits["train"].dataset[column][:])
    for records in splits.values():
        for index, label in enumerate(records.dataset[column][:]):
            if label not in known:
                raise ValueError(f"{records.name(index)}: {spell(label)} is not in the train split")


# ----------------------------------------------------------------------------------------------------------- splitting


def three(source: dict[str, Records], keys: Portions, seed: int, name: str) -> dict[str, Records]:
    """ "train", "validation" and "test": the source's own, or drawn with ``seed``. ``name``: the source's."""
    if "train" not in source:
        raise ValueError(f"{name} has no train split, but {', '.join(source)}")
    splits = {split: records for split, records in source.items() if split in SPLITS}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    train, total = splits["train"], len(splits["train"])
    order = _order(total, seed)
    cut, drawn = 0, {}
    for split in ("test", "validation"):
        if split not in splits:
            drawn[split] = share = getattr(keys, f"{split}_share")
            size = round(total * share)
            splits[split] = train.select(order[cut : cut + size])
            cut += size
    if cut:
        splits["train"] = train.select(order[cut:])
    for split in SPLITS:
        if not len(splits[split]):
            problem = f"{name}: the {split} split is empty"
            if total and split in drawn:
                problem += (
                    f": task.data.{split}_share={drawn[split]} of {total} is below one example; raise it{keys.few}"
                )
            raise ValueError(problem)
    return {split: _limited(splits[split], split, keys, seed) for split in SPLITS}


def _limited(records: Records, split: str, keys: Portions, seed: int) -> Records:
    """At most as many records as the keys say, drawn with ``seed``."""
    most = getattr(keys, f"{split}_examples")
    few = most is not None and most < len(records)
    return records.select(_order(len(records), seed)[:most]) if few else records


def _order(count: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


# ----------------------------------------------------------------------------------------------------------- batching


def padded(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Tensors padded with 0 to the largest, so that Trainer can move, split and gather them like any batch."""
    import torch

    return {key: _stacked([torch.as_tensor(example[key]) for example in examples]) for key in examples[0]}


def _stacked(tensors: list[Tensor]) -> Tensor:
    shape = [max(sides) for sides in zip(*(tensor.shape for tensor in tensors), strict=True)]
    batch = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(batch, tensors, strict=True):
        row[tuple(slice(side) for side in tensor.shape)] = tensor
    return batch
