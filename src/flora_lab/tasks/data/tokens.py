"""Answers as tokens: which of them the loss counts, and prompts without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

IGNORED = -100  # label of a token that the loss doesn't count


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
