"""What a training shows while it runs: one line with the time left, loss, learning rate, memory and validation."""

from __future__ import annotations

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from flora_lab.lines import LateLine, Line
from flora_lab.run.machine import peak_memory


def numbers(
    loss: float | None = None, rate: float | None = None, memory: int | None = None, validation: float | None = None
) -> str:
    """Those that there are: "loss 0.412, lr 8.1e-4, 1.2 GiB, val 0.926". ``memory`` is in bytes."""
    parts = [
        None if loss is None else f"loss {loss:#.3g}".rstrip("."),
        None if rate is None else f"lr {rate:.1e}".replace("e-0", "e-") if rate else "lr 0",
        None if memory is None else f"{memory / 2**30:.{int(memory < 10 << 30)}f} GiB",
        None if validation is None else f"val {validation:.3f}",
    ]
    return ", ".join(part for part in parts if part)


class Progress(TrainerCallback):
    """The line of a training, for any Trainer of transformers: ``Progress().attach(trainer)``.

    It shows the optimizer steps, the time left, the loss, the learning rate of the first group of parameters, the peak
    of memory (the accelerator's, or else the process's), and the last ``metric`` of the validation split. A line below
    it counts the batches of an evaluation that takes long.

    The loss is the mean since the line was last drawn if the Trainer calls `add`, and otherwise what it logged last.
    """

    def __init__(self, name: str = "training", metric: str = "loss", shown: bool = True):
        self.name, self.metric, self.shown = name, metric, shown
        self.line: Line | None = None
        self.evaluated: LateLine | None = None
        self.loss: float | None = None
        self.rate: float | None = None
        self.validation: float | None = None
        self._sum: torch.Tensor | float = 0.0
        self._count = 0

    def attach(self, trainer: Trainer) -> None:
        """Replace the bar and the printed logs of ``trainer`` with this line."""
        for other in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def add(self, loss: torch.Tensor) -> None:
        """Take note of a step's loss, without waiting for an accelerator."""
        self._sum = self._sum + loss.detach()
        self._count += 1

    def on_train_begin(self, args, state, control, **kwargs):
        shown = self.shown and state.is_world_process_zero
        self.line = Line(self.name, state.max_steps, state.global_step, shown)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rate = optimizer.param_groups[0]["lr"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.evaluated is None:
            self.evaluated = LateLine("evaluating", len(eval_dataloader), self.shown)
        self.evaluated.advance()
        if self.evaluated.done == self.evaluated.total:
            self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self.evaluated is not None:
            self.evaluated.close()
        self.evaluated = None

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        # the test split has its own prefix
        self.validation = metrics.get(f"eval_{self.metric}", self.validation)
        self._draw(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.line.due() or state.global_step >= state.max_steps:
            self._draw(state.global_step)

    def _draw(self, step: int) -> None:
        if self._count:
            self.loss, self._sum, self._count = float(self._sum) / self._count, 0.0, 0
        if self.line is not None:  # an evaluation may come before a training
            self.line.draw(step, numbers(self.loss, self.rate, peak_memory(), self.validation))

    def close(self) -> None:
        """End the lines, also after an error."""
        self._end_evaluation()
        if self.line is not None:
            self.line.close()

    def on_train_end(self, args, state, control, **kwargs):
        self.close()
