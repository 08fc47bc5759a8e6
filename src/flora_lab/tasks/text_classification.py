"""Classes of your own texts, or pairs of texts, for any sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flora_lab.tasks.data.records import Records, need_known, three
from flora_lab.tasks.data.rows import Rows
from flora_lab.tasks.models.pretrained import Pretrained
from flora_lab.tasks.sentences import SentenceTask


@dataclass
class LabelledTexts(Rows):
    """Which columns have the texts and their classes."""

    text: str = field(default="text", metadata={"help": "column of the texts"})
    pair: str | None = field(default=None, metadata={"help": "column of the second texts, if each example has two"})
    label: str = field(default="label", metadata={"help": "column of the classes, names or whole numbers"})
    max_length: int = field(default=128, metadata={"help": "tokens per example, at most", "least": 8})


@dataclass
class TextClassification(SentenceTask):
    name: str = field(default="text_classification", metadata={"help": "the task"})
    model: Pretrained = field(default_factory=lambda: Pretrained(name="microsoft/deberta-v3-base"))
    data: LabelledTexts = field(default_factory=LabelledTexts)

    measures = ("accuracy", "macro_f1")

    @property
    def columns(self) -> Sequence[str]:
        return tuple(name for name in (self.data.text, self.data.pair) if name)

    def label(self, given: Any) -> int:
        return self.classes.index(given)

    def splits(self, seed: int) -> dict[str, Records]:
        splits = three(self._records, self.data, seed, self.data.path)
        need_known(splits, "labels", lambda label: f"class {self.classes[label]!r}")
        return splits

    @cached_property
    def _examples(self) -> dict[str, Records]:
        """The columns of texts, and "label" with the name of the class. A test split without labels is left out."""
        import datasets

        found = {}
        for split, records in self.data.read().items():
            if split == "test" and all(_lacks(row, self.data.label) for row in records.dataset):
                continue
            names = getattr(getattr(records.dataset, "features", {}).get(self.data.label), "names", None)
            rows = [self._example(records.name(index), row, names) for index, row in enumerate(records.dataset)]
            columns = {name: [row[name] for row in rows] for name in (*self.columns, "label")}
            found[split] = Records(datasets.Dataset.from_dict(columns), records.name)
        return found

    def _example(self, place: str, row: Any, names: Sequence[str] | None) -> dict[str, str]:
        """A row's texts and the name of its class. ``names``: of classes that are given as numbers.

        Raises ValueError naming ``place``.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: {row!r:.80} is not an object of columns")
        for column in (*self.columns, self.data.label):
            if column not in row:
                raise ValueError(f"{place} has no column {column!r}, but {', '.join(row)}")
        for column in self.columns:
            if not isinstance(row[column], str):
                raise ValueError(f"{place}: column {column!r} is {type(row[column]).__name__}, not text")
        label = row[self.data.label]
        if _lacks(row, self.data.label) or not isinstance(label, str | int):
            raise ValueError(f"{place}: {self.data.label}={label!r}; expected the name of a class, or a whole number")
        return {**{name: row[name] for name in self.columns}, "label": names[label] if names else str(label)}

    @cached_property
    def classes(self) -> Sequence[str]:
        """In the order of their numbers, else of their names."""
        found = {name for records in self._examples.values() for name in records.dataset["label"]}
        return sorted(found, key=int if all(name.isdecimal() for name in found) else None)

    @cached_property
    def _records(self) -> dict[str, Records]:
        """Raises ValueError if there is one class only."""
        if len(self.classes) < 2:
            raise ValueError(f"{self.data.path} has the class {', '.join(self.classes)} only; expected two or more")
        return {split: self.tokenized(records) for split, records in self._examples.items()}


def _lacks(row: Any, column: str) -> bool:
    """Whether a row has no label. The hub marks test splits whose labels are not public by -1."""
    return isinstance(row, Mapping) and row.get(column) in (None, "", -1)
