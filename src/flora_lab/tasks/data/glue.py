"""GLUE's eight subsets: their columns and labels on the hub and in the official TSVs, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.files import hub_failure
from flora_lab.tasks.data.records import Records
from flora_lab.tasks.data.texts import read_text

ENTAILS = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Subset:
    """One of GLUE's tasks.

    ``metrics``: the first is reported. ``hub``: the text columns on the hub, beside "label". ``tsv``: the text columns
    and the label's in the official TSVs. ``classes``: as the TSVs spell them, in the order of the hub's numbers; empty
    if the label is a score from 0 to 5. ``bare``: the columns of a TSV that has no header. ``dev``: the end of the dev
    split's name.
    """

    metrics: tuple[str, ...]
    hub: tuple[str, ...]
    tsv: tuple[str, ...]
    classes: tuple[str, ...] = ("0", "1")
    bare: tuple[str, ...] = ()
    dev: str = ""

    def label(self, given: Any) -> int | float:
        """The label as a number. TSVs have it as text, the hub as a number. Raises ValueError if it is not a label."""
        if not self.classes:
            try:
                score = float(given)
            except (TypeError, ValueError):
                score = -1.0
            if 0 <= score <= 5:
                return score
            raise ValueError(f"score {given!r}; expected a number from 0 to 5")
        if isinstance(given, str) and given in self.classes:
            return self.classes.index(given)
        if isinstance(given, int) and 0 <= given < len(self.classes):
            return given
        accepted = ", ".join(self.classes) if isinstance(given, str) else f"0 to {len(self.classes) - 1}"
        raise ValueError(f"label {given!r}; expected {accepted}")


PAIR = ("sentence1", "sentence2")
SUBSETS = {
    "mnli": Subset(
        ("accuracy",),
        ("premise", "hypothesis"),
        (*PAIR, "gold_label"),
        ("entailment", "neutral", "contradiction"),
        dev="_matched",
    ),
    "sst2": Subset(("accuracy",), ("sentence",), ("sentence", "label"), bare=("sentence", "label")),
    "cola": Subset(("matthews",), ("sentence",), ("sentence", "label"), bare=("source", "label", "mark", "sentence")),
    "qqp": Subset(("accuracy", "f1"), ("question1", "question2"), ("question1", "question2", "is_duplicate")),
    "qnli": Subset(("accuracy",), ("question", "sentence"), ("question", "sentence", "label"), ENTAILS),
    "rte": Subset(("accuracy",), PAIR, (*PAIR, "label"), ENTAILS),
    "mrpc": Subset(("accuracy", "f1"), PAIR, ("#1 String", "#2 String", "Quality")),
    "stsb": Subset(("pearson", "spearman"), PAIR, (*PAIR, "score"), classes=()),
}


def read_tsv(file: Path, subset: Subset, skip_broken: bool) -> Records:
    """A TSV's lines, with the hub's columns. Quotes have no meaning in it.

    ``skip_broken``: leave out lines with too many or too few fields. Raises ValueError naming file and line.
    """
    import datasets

    text = read_text(file).rstrip("\r\n")  # and blank lines at the end
    if not text:
        raise ValueError(f"{file} is empty")
    lines = [line.split("\t") for line in text.split("\n")]
    header, start = lines[0], 1
    if not set(subset.tsv) <= set(header):
        if len(header) != len(subset.bare):
            given = ", ".join(map(repr, header))[:100]
            raise ValueError(f"{file}, line 1: expected the columns {', '.join(subset.tsv)}; found {given}")
        header, start = list(subset.bare), 0
    columns = [header.index(name) for name in subset.tsv]
    rows, places = [], []
    for number, line in enumerate(lines[start:], start + 1):
        if len(line) == len(header):
            rows.append([line[column] for column in columns])
            places.append(f"{file}, line {number}")
        elif not skip_broken:
            raise ValueError(
                f"{file}, line {number}: {len(line)} fields, expected {len(header)} "
                "(task.data.skip_broken=true leaves such lines out)"
            )
    names = (*subset.hub, "label")
    content = {name: [row[column] for row in rows] for column, name in enumerate(names)}
    return Records(datasets.Dataset.from_dict(content), places.__getitem__)


def read_hub(path: str, subset: str, split: str) -> Records:
    import datasets

    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of the hub's and datasets' many classes
        raise ValueError(hub_failure(path, error)) from error
    return Records(rows, lambda index: f"{path}, {split}, row {index}")
