"""GLUE (Wang et al. 2018): eight tasks on sentences or pairs of them, for any sequence classifier of transformers.

Its test labels are not public: as in the paper (Table 3) the dev set is what is tested on, so it is never chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from flora.tasks.base import Task
from flora.tasks.data import Portions, Table, need_columns, need_known, three
from flora.tasks.pretrained import Pretrained

OUTPUTS = ("classifier", "score", "classification_head", "logits_proj")  # what transformers calls an output layer
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


@dataclass
class Sentences(Portions):
    path: str = field(default="nyu-mll/glue", metadata={"help": "a hub name, or a folder with train.tsv and dev.tsv"})
    max_length: int = field(default=128, metadata={"help": "tokens of an example, at the most", "least": 8})
    skip_broken: bool = field(
        default=False, metadata={"help": "leave out a TSV's lines with too many or few fields (QQP's own has some)"}
    )


@dataclass
class Glue(Task):
    name: str = field(default="glue", metadata={"help": "the job"})
    subset: str = field(default="cola", metadata={"help": f"one of {', '.join(SUBSETS)}"})
    model: Pretrained = field(default_factory=lambda: Pretrained(name="microsoft/deberta-v3-base"))
    data: Sentences = field(default_factory=Sentences)

    targets = "all-linear"

    def __post_init__(self):
        if self.subset not in SUBSETS:
            raise ValueError(f"task.subset={self.subset}: expected one of {', '.join(SUBSETS)}")

    @property
    def metric(self) -> str:
        return self._subset.metrics[0]

    @property
    def _subset(self) -> Subset:
        return SUBSETS[self.subset]

    def splits(self, seed: int) -> dict[str, Table]:
        splits = three(self._tables, self.data, seed, self.data.path)
        if self._subset.classes:
            need_known(splits, "labels", lambda label: f"label {self._subset.classes[label]!r}")
        return splits

    @cached_property
    def _tables(self) -> dict[str, Table]:
        """ "train", and dev as "test": input ids and labels, not padded."""
        import datasets

        datasets.disable_progress_bars()
        path = self.data.path
        if Path(path).is_dir():
            names = {"train": "train.tsv", "test": f"dev{self._subset.dev}.tsv"}
            found = {split: _tsv(Path(path, name), self._subset, self.data) for split, name in names.items()}
        else:
            names = {"train": "train", "test": f"validation{self._subset.dev}"}
            found = {split: _hub(path, self.subset, name) for split, name in names.items()}
            need_columns(found, *self._subset.hub, "label")
        return {split: self._tokenised(table) for split, table in found.items()}

    def _tokenised(self, table: Table) -> Table:
        """Raises ValueError naming a row that has no text, or no label of the task."""
        names = self._subset.hub

        def examples(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
            labels = []
            for index, given, *texts in zip(indices, rows["label"], *(rows[name] for name in names), strict=True):
                try:
                    labels.append(self._subset.label(given))
                    if not all(isinstance(text, str) for text in texts) or not "".join(texts).strip():
                        raise ValueError("no text")
                except ValueError as error:
                    raise ValueError(f"{table.name(index)}: {error}") from error
            texts = [rows[name] for name in names]
            return {**self.tokenizer(*texts, truncation=True, max_length=self.data.max_length), "labels": labels}

        rows = table.rows.map(
            examples, batched=True, with_indices=True, remove_columns=table.rows.column_names, keep_in_memory=True
        )
        return Table(rows, table.name)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name, length = self.model.name, self.data.max_length
        if not name:
            raise ValueError(f"task.model.name={name}: expected a model's folder or hub name, for its tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up where there is no file of it
            raise ValueError(f"{name} has no tokenizer")
        if length > tokenizer.model_max_length:
            raise ValueError(f"task.data.max_length={length}: {name} reads up to {tokenizer.model_max_length} tokens")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def build(self) -> nn.Module:
        classes = self._subset.classes
        return self.model.load(
            "AutoModelForSequenceClassification",
            OUTPUTS,
            num_labels=len(classes) or 1,
            problem_type="single_label_classification" if classes else "regression",
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def head(self, model: nn.Module) -> list[str]:
        """All but the body: DeBERTa's pooler too, of which its checkpoint has no weights."""
        parts = model.named_children()
        return [name for name, part in parts if name != model.base_model_prefix and list(part.parameters())]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from transformers import DataCollatorWithPadding

        return dict(DataCollatorWithPadding(self.tokenizer)(list(examples)))

    def metrics(self, prediction: Any) -> dict[str, float]:
        """A correlation that is not defined, such as with the same prediction for every example, is 0."""
        import numpy
        from scipy import stats
        from sklearn import metrics

        scores, labels = prediction.predictions, prediction.label_ids
        found = scores.argmax(-1) if self._subset.classes else scores.reshape(-1)
        defined = numpy.isfinite(found).all() and numpy.ptp(found) > 0 and numpy.ptp(labels) > 0
        functions = {
            "accuracy": metrics.accuracy_score,
            "f1": lambda *pair: metrics.f1_score(*pair, zero_division=0),
            "matthews": metrics.matthews_corrcoef,
            "pearson": lambda *pair: stats.pearsonr(*pair).statistic if defined else 0,
            "spearman": lambda *pair: stats.spearmanr(*pair).statistic if defined else 0,
        }
        return {name: float(functions[name](labels, found)) for name in self._subset.metrics}


# ---------------------------------------------------------------------------------------------------------- reading


def _tsv(file: Path, subset: Subset, keys: Sentences) -> Table:
    """A TSV's rows, with the hub's columns. Quotes are characters like any other in it."""
    import datasets

    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: {error.reason}; expected UTF-8") from error
    if not text:
        raise ValueError(f"{file} is empty")
    lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    header, start = lines[0], 1
    if not set(subset.tsv) <= set(header):
        if len(header) != len(subset.bare):
            found = ", ".join(header)[:100]
            raise ValueError(f"{file}, line 1: expected the columns {', '.join(subset.tsv)}, found {found}")
        header, start = list(subset.bare), 0
    columns = [header.index(name) for name in subset.tsv]
    rows, places = [], []
    for number, line in enumerate(lines[start:], start + 1):
        if len(line) == len(header):
            rows.append([line[column] for column in columns])
            places.append(f"{file}, line {number}")
        elif not keys.skip_broken:
            raise ValueError(
                f"{file}, line {number}: {len(line)} fields, expected {len(header)} "
                "(task.data.skip_broken=true leaves such lines out)"
            )
    names = (*subset.hub, "label")
    found = {name: [row[column] for row in rows] for column, name in enumerate(names)}
    return Table(datasets.Dataset.from_dict(found), places.__getitem__)


def _hub(path: str, subset: str, split: str) -> Table:
    import datasets

    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{path}: no such folder")
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of the hub's and datasets' many classes
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return Table(rows, lambda index: f"{path}, {split}, row {index}")
