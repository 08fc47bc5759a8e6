"""GLUE (Wang et al. 2018): eight tasks on sentences or sentence pairs, for any sequence classifier of transformers.

Its test labels are not public. As in the paper (Table 3), the dev set is the test split, so it chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flora.files import local_path
from flora_lab.tasks.data.glue import SUBSETS, Subset, read_hub, read_tsv
from flora_lab.tasks.data.records import Portions, Records, need_columns, need_known, three
from flora_lab.tasks.models.pretrained import Pretrained
from flora_lab.tasks.sentences import SentenceTask


@dataclass
class Sentences(Portions):
    path: str = field(
        default="nyu-mll/glue",
        metadata={"help": "name on the hub, or folder of train.tsv and dev.tsv", "path": True},
    )
    max_length: int = field(default=128, metadata={"help": "tokens per example, at most", "least": 8})
    skip_broken: bool = field(
        default=False, metadata={"help": "leave out lines of a TSV with too many or too few fields (QQP's has some)"}
    )


@dataclass
class Glue(SentenceTask):
    name: str = field(default="glue", metadata={"help": "the task"})
    subset: str = field(default="cola", metadata={"help": f"one of {', '.join(SUBSETS)}"})
    model: Pretrained = field(default_factory=lambda: Pretrained(name="microsoft/deberta-v3-base"))
    data: Sentences = field(default_factory=Sentences)

    def __post_init__(self):
        if self.subset not in SUBSETS:
            raise ValueError(f"task.subset={self.subset}: expected one of {', '.join(SUBSETS)}")

    @property
    def _subset(self) -> Subset:
        return SUBSETS[self.subset]

    @property
    def columns(self) -> Sequence[str]:
        return self._subset.hub

    @property
    def classes(self) -> Sequence[str]:
        return self._subset.classes

    @property
    def measures(self) -> Sequence[str]:
        return self._subset.metrics

    def label(self, given: Any) -> int | float:
        return self._subset.label(given)

    def splits(self, seed: int) -> dict[str, Records]:
        splits = three(self._records, self.data, seed, self.data.path)
        if self.classes:
            need_known(splits, "labels", lambda label: f"label {self.classes[label]!r}")
        return splits

    @cached_property
    def _records(self) -> dict[str, Records]:
        """ "train", and dev as "test": input ids and labels, without padding."""
        import datasets

        datasets.disable_progress_bars()
        subset, path = self._subset, self.data.path
        if folder := local_path(path):
            names = {"train": "train.tsv", "test": f"dev{subset.dev}.tsv"}
            splits = {split: read_tsv(folder / name, subset, self.data.skip_broken) for split, name in names.items()}
        else:
            names = {"train": "train", "test": f"validation{subset.dev}"}
            splits = {split: read_hub(path, self.subset, name) for split, name in names.items()}
            need_columns(splits, *subset.hub, "label")
        return {split: self.tokenized(records) for split, records in splits.items()}
