"""Tasks that are evaluated by answers: how a model generates them, their texts, and how many are right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import Task
from flora_lab.tasks.data.texts import read_text
from flora_lab.tasks.data.tokens import IGNORED
from flora_lab.tasks.evaluation.answers import accuracy
from flora_lab.tasks.models.language_model import LanguageModel
from flora_lab.tasks.models.pretrained import brief

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    chat_template: str | None

    def load(self) -> None:
        """Load the tokenizer and the model's config, before any row, which would be blamed for what they lack.

        Raises ValueError naming the key.
        """
        _ = self.tokenizer, self.model.config_of_text

    def with_template(self, reader: Any) -> Any:
        """The tokenizer or processor with the template of the file, if there is one. Raises ValueError naming it."""
        if self.chat_template:
            reader.chat_template = read_text(Path(self.chat_template).expanduser())
        return reader

    def templated(self, reader: Any, messages: list[dict[str, Any]], **keys: Any) -> Any:
        """What the tokenizer's or processor's template makes of messages. Raises ValueError if it refuses them."""
        try:
            return reader.apply_chat_template(messages, **keys)
        except Exception as error:  # a template's own code may raise anything
            template = self.chat_template or self.model.reader
            raise ValueError(f"the chat template of {template} refuses it: {brief(error)}") from error

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
