"""GLUE (Wang et al. 2018): eight tasks on sentences or sentence pairs, for any sequence classifier of transformers.

Its test labels are not public. As in the paper (Table 3), the dev set is the test split, so it chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flora.files import local_path
from flora_lab.tasks.base import Task
from flora_lab.tasks.data.glue import SUBSETS, Subset, read_hub, read_tsv
from flora_lab.tasks.data.records import Portions, Records, need_columns, need_known, three
from flora_lab.tasks.models.pretrained import Pretrained, brief

if TYPE_CHECKING:
    from torch import Tensor, nn

OUTPUTS = ("classifier", "score", "classification_head", "logits_proj")  # transformers' names of output layers


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
class Glue(Task):
    name: str = field(default="glue", metadata={"help": "the task"})
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

    def splits(self, seed: int) -> dict[str, Records]:
        splits = three(self._records, self.data, seed, self.data.path)
        if self._subset.classes:
            need_known(splits, "labels", lambda label: f"label {self._subset.classes[label]!r}")
        return splits

    def check(self, splits: dict[str, Records]) -> None:
        """Pass each split's longest example, and the one with the largest token, through the model: it may have fewer
        positions or a smaller vocabulary than the tokenizer."""
        import torch

        model = self.build().eval()
        for records in splits.values():
            ids = records.dataset["input_ids"][:]
            for index in {max(range(len(ids)), key=lambda row: size(ids[row])) for size in (len, max)}:
                try:
                    with torch.no_grad():
                        model(**self.collate([records[index]]))
                except Exception as error:  # a model's own code may raise anything
                    reason = self._reason(ids[index], model.config)
                    raise ValueError(f"{records.name(index)}: {reason} ({brief(error)})") from error

    def _reason(self, ids: list[int], config: Any) -> str:
        """Why an example does not pass through the model."""
        model, words = self.model.name, getattr(config, "vocab_size", None)
        if words and max(ids) >= words:
            return f"has token {max(ids)} of the tokenizer's {len(self.tokenizer)}; {model} has {words} only"
        positions = f"whose max_position_embeddings is {getattr(config, 'max_position_embeddings', None)}"
        lower = f"lower task.data.max_length={self.data.max_length}"
        return f"its {len(ids)} tokens do not pass through {model}, {positions}; {lower}"

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
        return {split: self._tokenize(records) for split, records in splits.items()}

    def _tokenize(self, records: Records) -> Records:
        """Raises ValueError naming a record without text, or with a label that the subset does not have."""
        names = self._subset.hub

        def examples(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
            labels = []
            for index, given, *texts in zip(indices, rows["label"], *(rows[name] for name in names), strict=True):
                try:
                    labels.append(self._subset.label(given))
                    if not all(isinstance(text, str) for text in texts) or not "".join(texts).strip():
                        raise ValueError("no text")
                except ValueError as error:
                    raise ValueError(f"{records.name(index)}: {error}") from error
            texts = [rows[name] for name in names]
            return {**self.tokenizer(*texts, truncation=True, max_length=self.data.max_length), "labels": labels}

        rows = records.dataset.map(
            examples, batched=True, with_indices=True, remove_columns=records.dataset.column_names, keep_in_memory=True
        )
        return Records(rows, records.name)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name, length = self.model.name, self.data.max_length
        if not name:
            raise ValueError(f"task.model.name={name}: expected a folder or a name on the hub, for the tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model.source())
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"{name}: {brief(error)}") from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if its file is missing
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
        """All modules except the base model; so also DeBERTa's pooler, for which its checkpoint has no weights."""
        parts = model.named_children()
        return [name for name, part in parts if name != model.base_model_prefix and list(part.parameters())]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from transformers import DataCollatorWithPadding

        return dict(DataCollatorWithPadding(self.tokenizer)(list(examples)))

    @staticmethod
    def reduce(logits: Any, labels: Tensor) -> Tensor:
        """The logits alone: an encoder-decoder returns more."""
        return logits[0] if isinstance(logits, tuple) else logits

    def metrics(self, prediction: Any) -> dict[str, float]:
        """All NaN if the model diverged. A correlation that is not defined is 0: if all predictions are equal, say."""
        import numpy
        from scipy import stats
        from sklearn import metrics

        scores, labels = prediction.predictions, prediction.label_ids
        if not numpy.isfinite(scores).all():
            return dict.fromkeys(self._subset.metrics, math.nan)
        predicted = scores.argmax(-1) if self._subset.classes else scores.reshape(-1)
        defined = numpy.ptp(predicted) > 0 and numpy.ptp(labels) > 0
        functions = {
            "accuracy": metrics.accuracy_score,
            "f1": lambda *pair: metrics.f1_score(*pair, zero_division=0),
            "matthews": metrics.matthews_corrcoef,
            "pearson": lambda *pair: stats.pearsonr(*pair).statistic if defined else 0,
            "spearman": lambda *pair: stats.spearmanr(*pair).statistic if defined else 0,
        }
        return {name: float(functions[name](labels, predicted)) for name in self._subset.metrics}
