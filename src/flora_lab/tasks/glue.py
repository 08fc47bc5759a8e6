"""GLUE (Wang et al. 2018): eight tasks on sentences or pairs of them, for any sequence classifier of transformers.

Its test labels are not public: as in the paper (Table 3) the dev set is what is tested on, so it is never chosen on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_lab.tasks.base import Task
from flora_lab.tasks.data import Portions, Table, need_columns, need_known, three
from flora_lab.tasks.glue_data import SUBSETS, Subset, read_hub, read_tsv
from flora_lab.tasks.pretrained import Pretrained, brief

OUTPUTS = ("classifier", "score", "classification_head", "logits_proj")  # what transformers calls an output layer


@dataclass
class Sentences(Portions):
    path: str = field(
        default="nyu-mll/glue", metadata={"help": "a hub name, or a folder with train.tsv and dev.tsv", "path": True}
    )
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

    def check(self, splits: dict[str, Table]) -> None:
        """Each split's longest example and the one with the largest token pass through the model, whose positions and
        vocabulary may be fewer than the tokenizer's; how positions are counted only the model itself knows."""
        model = self.build().eval()
        for table in splits.values():
            ids = table.rows["input_ids"][:]
            for index in {max(range(len(ids)), key=lambda row: size(ids[row])) for size in (len, max)}:
                try:
                    with torch.no_grad():
                        model(**self.collate([table[index]]))
                except Exception as error:  # a model's own code may raise anything
                    said = self._refusal(ids[index], model.config)
                    raise ValueError(f"{table.name(index)}: {said} ({brief(error)})") from error

    def _refusal(self, ids: list[int], config: Any) -> str:
        model, words = self.model.name, getattr(config, "vocab_size", None)
        if words and max(ids) >= words:
            return f"has token {max(ids)} of the tokenizer's {len(self.tokenizer)}; {model} has {words} only"
        positions = f"whose max_position_embeddings is {getattr(config, 'max_position_embeddings', None)}"
        lower = f"lower task.data.max_length={self.data.max_length}"
        return f"its {len(ids)} tokens do not pass through {model}, {positions}; {lower}"

    @cached_property
    def _tables(self) -> dict[str, Table]:
        """ "train", and dev as "test": input ids and labels, not padded."""
        import datasets

        datasets.disable_progress_bars()
        path = self.data.path
        if Path(path).is_dir():
            names = {"train": "train.tsv", "test": f"dev{self._subset.dev}.tsv"}
            found = {
                split: read_tsv(Path(path, name), self._subset, self.data.skip_broken) for split, name in names.items()
            }
        else:
            names = {"train": "train", "test": f"validation{self._subset.dev}"}
            found = {split: read_hub(path, self.subset, name) for split, name in names.items()}
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
            raise ValueError(f"{name}: {brief(error)}") from error
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

    @staticmethod
    def reduce(logits: Any, labels: Tensor) -> Tensor:
        """Of what an encoder-decoder gives, the logits alone."""
        return logits[0] if isinstance(logits, tuple) else logits

    def metrics(self, prediction: Any) -> dict[str, float]:
        """All NaN for a model that diverged. A correlation that is not defined, such as with the same prediction for
        every example, is 0."""
        import numpy
        from scipy import stats
        from sklearn import metrics

        scores, labels = prediction.predictions, prediction.label_ids
        if not numpy.isfinite(scores).all():
            return dict.fromkeys(self._subset.metrics, math.nan)
        found = scores.argmax(-1) if self._subset.classes else scores.reshape(-1)
        defined = numpy.ptp(found) > 0 and numpy.ptp(labels) > 0
        functions = {
            "accuracy": metrics.accuracy_score,
            "f1": lambda *pair: metrics.f1_score(*pair, zero_division=0),
            "matthews": metrics.matthews_corrcoef,
            "pearson": lambda *pair: stats.pearsonr(*pair).statistic if defined else 0,
            "spearman": lambda *pair: stats.spearmanr(*pair).statistic if defined else 0,
        }
        return {name: float(functions[name](labels, found)) for name in self._subset.metrics}
