"""What every task tells, and nothing of how anything is trained: that is ``flora_lab.run.train``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

HEADS = ("classifier", "score", "linear", "fc", "head")


class Examples(Protocol):
    """A split: ``examples[i]`` holds the keywords of the model's forward."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Task:
    """A job's data, its model, and how a prediction is judged.

    A task is a dataclass that inherits from this; its fields are its keys in a YAML, under ``task:``.
    """

    metric: ClassVar[str]  # of what `metrics` returns, the number to report and to choose by: the more the better
    targets: ClassVar[str] = "all-weights"  # what adapters adapt, unless the YAML's `target_modules` says otherwise
    reduce: ClassVar[Callable[[Any, Tensor], Any] | None] = None  # logits, labels -> what `metrics` needs of a batch

    def source_task(self) -> Task | None:
        """The same job on the data that the base model is first trained on; None where it comes pre-trained."""
        return None

    def splits(self, seed: int) -> dict[str, Examples]:
        """ "train", "validation" and "test". Raises ValueError naming what is wrong with their columns or labels."""
        raise NotImplementedError

    def check(self, splits: dict[str, Examples]) -> None:
        """Open what ``splits`` does not, every picture: whatever could stop a training later is found before, once.

        Raises ValueError naming file and row.
        """

    def build(self) -> nn.Module:
        """With what is new in it drawn from torch's generator. Its forward takes an example's keywords, batched, and
        returns a mapping with "loss" first where there are labels."""
        raise NotImplementedError

    def head(self, model: nn.Module) -> list[str]:
        """Names of the modules that every method trains: the new output layer."""
        return [name for name in HEADS if hasattr(model, name)]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from transformers import default_data_collator

        return default_data_collator(examples)

    def outputs(self, model: nn.Module, examples: Sequence[dict[str, Any]]) -> Tensor:
        """What a model in evaluation makes of examples, as one tensor that is smooth in its weights."""
        batch = self.collate(examples)
        batch.pop("labels")
        return model(**batch)[0]

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Numbers of a transformers ``EvalPrediction``."""
        raise NotImplementedError
