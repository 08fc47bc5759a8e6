"""GLUE's files: what its eight subsets are called and hold, on the hub and in the official TSVs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_lab.tasks.data import Table, is_place

ENTAILS = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Subset:
    """``metrics``: the one to report first. ``hub``: columns of texts on the hub, where the label's is "label".
    ``tsv``: those of the official TSVs, the label's last. ``classes``: as TSVs spell them, in the order of the hub's
    numbers; none for a score from 0 to 5. ``bare``: all columns of a TSV without a header, where there are such.
    ``dev``: what the dev split's name ends with."""

    metrics: tuple[str, ...]
    hub: tuple[str, ...]
    tsv: tuple[str, ...]
    classes: tuple[str, ...] = ("0", "1")
    bare: tuple[str, ...] = ()
    dev: str = ""

    def label(self, given: Any) -> int | float:
        """As a number; a TSV gives text, the hub a number already. Raises ValueError where it is no label."""
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


def read_tsv(file: Path, subset: Subset, skip_broken: bool) -> Table:
    """A TSV's rows, with the hub's columns. Quotes are characters like any other in it. Raises ValueError naming file
    and line; ``skip_broken`` leaves out lines with too many or few fields."""
    import datasets

    try:
        text = file.read_bytes().decode("utf-8-sig").rstrip("\r\n")  # blank lines at the end too
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: {error.reason}; expected UTF-8") from error
    if not text:
        raise ValueError(f"{file} is empty")
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    header, start = lines[0], 1
    if not set(subset.tsv) <= set(header):
        if len(header) != len(subset.bare):
            found = ", ".join(map(repr, header))[:100]
            raise ValueError(f"{file}, line 1: expected the columns {', '.join(subset.tsv)}; found {found}")
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
    found = {name: [row[column] for row in rows] for column, name in enumerate(names)}
    return Table(datasets.Dataset.from_dict(found), places.__getitem__)


def read_hub(path: str, subset: str, split: str) -> Table:
    import datasets

    if is_place(path):
        raise ValueError(f"{path}: no such folder")
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of the hub's and datasets' many classes
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return Table(rows, lambda index: f"{path}, {split}, row {index}")
