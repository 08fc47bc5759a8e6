"""What the tasks on language share: which tokens the loss counts, answers that a model generates, and their texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.answers import accuracy
from flora_lab.tasks.base import Task
from flora_lab.tasks.language_model import LanguageModel

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100  # label of a token that the loss doesn't count
TOKENS = "tokens"
EVALUATED = (
    "tokens: the next token, of answers; or generated answers, by their number, option, whole text or votes (vqa)"
)


class Answering(Task):
    """A task on answers: evaluated by their next tokens (`TOKENS`), or generated and compared (`ANSWERS`)."""

    model: LanguageModel
    tokenizer: Any
    evaluate: str
    new_tokens: int

    @property
    def metric(self) -> str:
        return "token_accuracy" if self.evaluate == TOKENS else "accuracy"

    def head(self, model: nn.Module) -> list[str]:
        """Nothing is new: the output layer is pre-trained."""
        return []

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        if self.evaluate == TOKENS:
            return None
        room = (self.model.positions or 2**31) - batch["input_ids"].shape[1]
        return generate(model, batch, self.tokenizer, min(self.new_tokens, room))

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        return top_tokens(logits) if self.evaluate == TOKENS else logits

    def metrics(self, prediction: Any) -> dict[str, float]:
        if self.evaluate == TOKENS:
            return {self.metric: token_accuracy(prediction.predictions, prediction.label_ids)}
        texts = [decoded(self.tokenizer, ids) for ids in (prediction.predictions, prediction.label_ids)]
        return {self.metric: accuracy(self.evaluate, *texts)}


def answer_labels(ids: list[int], spans: Iterable[tuple[list[int], list[int]]]) -> list[int]:
    """``ids`` where an answer is, `IGNORED` elsewhere.

    ``spans``: for each answer the tokens up to its start, and up to its end. Where tokens merge over a border, or a
    template spells the beginning of a conversation differently, an answer starts or ends where they part from ``ids``.

    Raises ValueError if an answer has no token of its own.
    """
    labels = [IGNORED] * len(ids)
    for before, after in spans:
        start, end = _common(before, ids), _common(after, ids)
        if end <= start:
            raise ValueError(
                "its answers are not where the chat template puts them alone; set task.data.answers_only=false"
            )
        labels[start:end] = ids[start:end]
    return labels


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """The number of tokens that both start with."""
    from trl.data_utils import common_prefix_length

    return common_prefix_length(some, others)


def prompts(tokenizer: Any, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """A batch of prompts, padded on the left, so that answers follow on their right; "labels": the right answers."""
    import torch

    rows = [{"input_ids": example["prompt"]} for example in examples]
    batch = dict(tokenizer.pad(rows, padding_side="left", return_tensors="pt"))
    answers = [torch.tensor(example["answer"]) for example in examples]
    return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)}


def generate(model: nn.Module, batch: dict[str, Any], tokenizer: Any, new_tokens: int) -> Tensor:
    """The answers to a batch of prompts (examples, tokens): at every step the most probable token, up to the end."""
    from transformers import GenerationConfig

    ends = getattr(model.generation_config, "eos_token_id", None)  # a chat model ends its turns with one of several
    ends = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or [])}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends)}
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, **special)
    return model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]


def decoded(tokenizer: Any, ids: Any) -> list[str]:
    """The texts of an array of tokens (examples, tokens), padded with `IGNORED`."""
    import numpy as np

    ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def top_tokens(logits: Any) -> Tensor:
    """(examples, tokens, words) -> (examples, tokens): the most probable token, or -1 where logits are not finite."""
    import torch

    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def token_accuracy(predictions: Any, labels: Any) -> float:
    """The share of answers' tokens that are the most probable ones; NaN if the model diverged."""
    predictions, labels = predictions[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    if (predictions[counted] == -1).any():
        return math.nan
    return float((predictions == labels)[counted].mean())
