"""Forgetting: by how much a fine-tuned language model is worse at texts that its data are not about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flora_lab.lines import counted
from flora_lab.tasks.data.rows import read_rows

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Passages:
    """The texts: the first long ones of the test split, or of train if there is no other."""

    path: str = field(default="", metadata={"help": "a file, a folder, or a name on the hub", "path": True})
    subset: str | None = field(default=None, metadata={"help": "of a data set on the hub"})
    column: str = field(default="text", metadata={"help": "the texts' column"})
    examples: int = field(default=100, metadata={"help": "how many texts", "least": 1})
    characters: int = field(default=500, metadata={"help": "leave out shorter texts", "least": 1})
    max_length: int = field(default=768, metadata={"help": "tokens per text; the rest is cut", "least": 2})

    def read(self, tokenizer: Any, positions: int | None) -> list[list[int]]:
        """The tokens of each text, for a model of so many positions. Raises ValueError naming the source, or the row
        that has no text, or only one token."""
        if not self.path:
            raise ValueError("task.forgetting.path: expected a file, a folder, or a name on the hub")
        splits = read_rows(self.path, self.subset)
        records = splits.get("test") or splits["train"]
        most = min(self.max_length, positions or self.max_length)
        texts: list[list[int]] = []
        for index in range(len(records)):
            row = records[index]
            text = row.get(self.column) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{records.name(index)}: no text in column {self.column!r}")
            if len(text) >= self.characters:
                texts.append(tokenizer(text, truncation=True, max_length=most)["input_ids"])
                if len(texts[-1]) < 2:
                    raise ValueError(f"{records.name(index)}: a single token, so there is no next one to predict")
            if len(texts) == self.examples:
                break
        if not texts:
            raise ValueError(f"{self.path}: no text of {self.characters} characters (task.forgetting.characters)")
        return texts


def loss(model: nn.Module, texts: list[list[int]]) -> float:
    """The mean cross entropy of the next token, in nats, over all tokens of ``texts``."""
    import torch

    device = next(model.parameters()).device
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for text in counted(texts, len(texts), "forgetting"):
            ids = torch.tensor(text, device=device)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum").item()
            count += len(text) - 1
    return total / count


def forgotten(model: nn.Module, base: Any, texts: list[list[int]]) -> dict[str, float]:
    """{"forgetting": the loss of ``model`` minus that of ``base()``, the model before the training}."""
    device = next(model.parameters()).device
    after = loss(model, texts)
    model.cpu()  # one model at a time fits where training did
    return {"forgetting": after - loss(base().to(device), texts)}
