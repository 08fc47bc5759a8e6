"""transformers' Trainer with what every task and method needs of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import peft
import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer

from flora_lab.run.progress import Progress
from flora_lab.tasks import Task


class TaskTrainer(Trainer):
    """transformers' Trainer, which evaluates as the task does, and says when a run with a ``title`` diverges."""

    title, task, progress, diverged = "", Task(), Progress(), False
    LOOK = 10  # steps between two looks at an accelerator, since each waits for it

    def __init__(self, model: nn.Module, *args, **kwargs):
        base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        self._forward = base, vars(base).get("forward")
        with _adapters_known(model):
            super().__init__(model, *args, **kwargs)

    def trained(self) -> nn.Module:
        """The model, without the wrappers of distributed or mixed-precision training, and with the forward it had.

        TRL puts another one on it, through which a copy would run this model.
        """
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        base, forward = self._forward
        vars(base).pop("forward", None)
        if forward:
            base.forward = forward
        return model

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.progress.add(loss)
        if not self.diverged:
            step = self.state.global_step + 1
            first = self.__dict__.setdefault("_lost", torch.zeros((), dtype=torch.long, device=loss.device))
            first.copy_(torch.where((first == 0) & ~loss.detach().isfinite(), step, first))
            if loss.device.type == "cpu" or step % self.LOOK == 0:
                self.say_if_diverged()
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, predictions, labels) of a batch; without a loss if the task makes the predictions."""
        inputs = self._prepare_inputs(inputs)
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), self.compute_loss_context_manager():
            predicted = self.task.predict(self.accelerator.unwrap_model(model), given)
        if predicted is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return None, predicted, inputs["labels"]

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self.say_if_diverged()
        # outputs may overflow where the loss does not; detectors have no loss in evaluation, and say NaN
        if any(math.isnan(value) for name, value in metrics.items() if not name.endswith("_loss")):
            self._say(self.state.global_step, "outputs are")
        return metrics

    def lost_at(self) -> int:
        """The first step whose loss was not finite, from 1; 0 if all were."""
        return int(self.__dict__.get("_lost", 0))

    def say_if_diverged(self) -> None:
        if step := self.lost_at():
            self._say(step, "loss is")

    def _say(self, step: int, what: str) -> None:
        """Once."""
        if self.title and not self.diverged and self.is_world_process_zero():
            tqdm.write(f"{self.title} diverged at step {step}: its {what} not finite", file=sys.stderr)
        self.diverged = True

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but DoRA's magnitudes: their decay would shrink the frozen weight, not only its update."""
        return [name for name in super().get_decay_parameter_names(model) if "magnitude_vector" not in name]


def trainer_of(task: Task, model: nn.Module) -> type[TaskTrainer]:
    """The task's own kind of Trainer, which evaluates as the task does."""
    return type("TaskTrainer", (TaskTrainer, task.trainer(model)), {"task": task})


@contextmanager
def _adapters_known(model: nn.Module) -> Iterator[None]:
    """Trainer refuses a quantized model without adapters, and knows those of PEFT only: tell it of all others."""
    mark = "_hf_peft_config_loaded"
    if isinstance(model, peft.PeftModel) or not getattr(model, "is_quantized", False):
        yield
        return
    setattr(model, mark, True)
    try:
        yield
    finally:
        delattr(model, mark)  # the class has False
