"""What every task defines. How a model is trained is in ``flora_lab.run.fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback


HEADS = ("classifier", "score", "linear", "fc", "head")  # usual names of output layers


class Examples(Protocol):
    """A split: ``examples[i]`` holds the keywords of the model's forward."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Task:
    """The data, the model, and how a prediction is evaluated.

    A task is a dataclass that inherits from this; its fields are the keys under ``task:`` in a YAML.
    """

    metric: ClassVar[str]  # the number of `metrics` to report and to choose by; higher is better
    targets: ClassVar[str] = "all-weights"  # what to adapt, unless the YAML has `target_modules`
    judging: ClassVar[Sequence[str]] = ()  # keys that only add numbers to a row
    reduce: ClassVar[Callable[[Any, Any], Any] | None] = None  # logits, labels -> what `metrics` needs of a batch

    def source_task(self) -> Task | None:
        """The same task on the data that the base model is trained on first; None if the model is pre-trained."""
        return None

    def decisive(self) -> dict[str, Any]:
        """The keys on which a trial's numbers depend."""
        return {key: value for key, value in asdict(self).items() if key not in self.judging}

    def splits(self, seed: int) -> dict[str, Examples]:
        """ "train", "validation" and "test". Raises ValueError naming the columns or labels that are wrong."""
        raise NotImplementedError

    def check(self, splits: dict[str, Examples]) -> None:
        """Check what ``splits`` does not read, such as every picture, so that no training fails on it later.

        Raises ValueError naming file and row.
        """

    def build(self) -> nn.Module:
        """The model, with new weights drawn from torch's generator.

        Its forward takes an example's keywords, batched, and returns a mapping, with "loss" first if there are labels.
        """
        raise NotImplementedError

    def head(self, model: nn.Module) -> list[str]:
        """Names of the modules that every method trains: the new output layer."""
        return [name for name in HEADS if hasattr(model, name)]

    def targets_of(self, model: nn.Module) -> str | list[str]:
        """What to adapt in this model, unless the YAML has `target_modules`."""
        return self.targets

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from transformers import default_data_collator

        return default_data_collator(examples)

    def outputs(self, model: nn.Module, examples: Sequence[dict[str, Any]]) -> Tensor:
        """A model's outputs in evaluation, as one tensor that depends smoothly on its weights."""
        from accelerate.utils import send_to_device

        batch = self.collate(examples)
        batch.pop("labels")
        return model(**send_to_device(batch, next(model.parameters()).device))[0]

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """What `metrics` needs of a batch without its labels, such as generated tokens; None: the model's outputs."""
        return None

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Metrics of a transformers ``EvalPrediction``."""
        raise NotImplementedError

    def trainer(self, model: nn.Module) -> type[Trainer]:
        """Whose steps the training of this model takes."""
        from transformers import Trainer

        return Trainer

    def callbacks(self, folder: Path) -> list[TrainerCallback]:
        """What the task adds to a training. ``folder``: the trial's, for what they leave."""
        return []

    def judge(
        self, model: nn.Module, base: Callable[[], nn.Module], splits: dict[str, Any], folder: Path
    ) -> dict[str, Any]:
        """What the task adds to a trial's row when it is trained and saved: further numbers of "test", "notes", and
        keys of its own.

        Args:
            model: the trained one.
            base: makes the model as it was before the training.
            folder: the trial's, for files; its "trained" has the trained weights.
        """
        return {}
