"""What tasks on sentences share: a tokenizer, a sequence classifier of transformers, and how its outputs are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import Task
from flora_lab.tasks.data.records import Records
from flora_lab.tasks.models.pretrained import Pretrained, brief

if TYPE_CHECKING:
    from torch import Tensor, nn

OUTPUTS = ("classifier", "score", "classification_head", "logits_proj")  # transformers' names of output layers


class SentenceTask(Task):
    """Classes, or a score, of sentences or pairs of them."""

    model: Pretrained
    data: Any  # with `max_length`

    targets = "all-linear"

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the texts, one or two, beside "label"."""
        raise NotImplementedError

    @property
    def classes(self) -> Sequence[str]:
        """Their names; none if the label is a score."""
        raise NotImplementedError

    @property
    def measures(self) -> Sequence[str]:
        """What `metrics` returns, the number to choose by first."""
        raise NotImplementedError

    @property
    def metric(self) -> str:
        return self.measures[0]

    def label(self, given: Any) -> int | float:
        """A label as the number of its class, or as a score. Raises ValueError if it is neither."""
        raise NotImplementedError

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

    def tokenized(self, records: Records) -> Records:
        """Input ids and labels, without padding. Raises ValueError naming a record without text, or with a label that
        is none."""
        names = self.columns

        def examples(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
            labels = []
            for index, given, *texts in zip(indices, rows["label"], *(rows[name] for name in names), strict=True):
                try:
                    labels.append(self.label(given))
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
            raise ValueError(f"task.model.name={name}: {brief(error, name)}") from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if its file is missing
            raise ValueError(f"task.model.name={name} has no tokenizer")
        if length > tokenizer.model_max_length:
            raise ValueError(f"task.data.max_length={length}: {name} reads up to {tokenizer.model_max_length} tokens")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def build(self) -> nn.Module:
        names = dict(enumerate(self.classes or ("score",)))
        return self.model.load(
            "AutoModelForSequenceClassification",
            OUTPUTS,
            num_labels=len(names),
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type="single_label_classification" if self.classes else "regression",
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
            return dict.fromkeys(self.measures, math.nan)
        predicted = scores.argmax(-1) if self.classes else scores.reshape(-1)
        defined = numpy.ptp(predicted) > 0 and numpy.ptp(labels) > 0
        functions = {
            "accuracy": metrics.accuracy_score,
            "f1": lambda *pair: metrics.f1_score(*pair, zero_division=0),
            "macro_f1": lambda *pair: metrics.f1_score(*pair, average="macro", zero_division=0),
            "matthews": metrics.matthews_corrcoef,
            "pearson": lambda *pair: stats.pearsonr(*pair).statistic if defined else 0,
            "spearman": lambda *pair: stats.spearmanr(*pair).statistic if defined else 0,
        }
        return {name: float(functions[name](labels, predicted)) for name in self.measures}
