"""What a training shows while it runs: one line with the time left, loss, learning rate, memory and validation.

On a terminal the line is drawn anew twice a second and fits into 80 columns. In a file, which keeps every state of it,
there is one line per minute.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from flora_lab.run.machine import peak_memory

ON_TERMINAL, IN_FILE = 0.5, 60.0  # seconds between two states of the line
FORMAT = "{desc} {bar} {n_fmt}/{total_fmt} {remaining} left{postfix}"
NAME = 10  # columns that a name gets on a terminal


class Lines:
    """A file for tqdm in which each state of a bar is a line of its own."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        state = text.replace("\x1b[A", "").strip()  # tqdm also writes how to move between two bars
        if state:
            self.file.write(f"{state}\n")

    def flush(self) -> None:
        self.file.flush()


class Line:
    """A tqdm bar on stderr. The time left follows from the mean speed since the start, evaluations included."""

    def __init__(self, name: str, total: int, initial: int, shown: bool):
        self.terminal = sys.stderr.isatty()
        self.interval = ON_TERMINAL if self.terminal else IN_FILE
        self.drawn = time.monotonic()
        self.bar = tqdm(
            desc=self.fitted(name),
            total=total,
            initial=initial,
            bar_format=FORMAT if self.terminal else FORMAT.replace(" {bar}", ""),
            dynamic_ncols=self.terminal,
            file=sys.stderr if self.terminal else Lines(sys.stderr),
            miniters=1,  # tqdm's own thread then draws nothing
            smoothing=0,
            disable=not shown,
        )

    def fitted(self, name: str) -> str:
        """The name, cut on a terminal if it is long."""
        return f"{name[: NAME - 1]}…" if self.terminal and len(name) > NAME else name

    def due(self) -> bool:
        """Whether it is time to draw the line."""
        return not self.bar.disable and time.monotonic() - self.drawn >= self.interval

    def draw(self, count: int, text: str) -> None:
        """Say that ``count`` of all are done, and ``text``; in a file at the next full minute, or at the end."""
        if not self.bar.disable:
            now = self.terminal or self.due()
            self.bar.n = count
            self.bar.set_postfix_str(text, refresh=now)
            self.drawn = time.monotonic() if now else self.drawn

    def advance(self, text: str) -> None:
        """Say that one more is done."""
        self.draw(self.bar.n + 1, text)

    def close(self) -> None:
        self.bar.close()


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
    of memory (the accelerator's, or else the process's), and the last ``metric`` of the validation split.

    The loss is the mean since the line was last drawn if the Trainer calls `add`, and otherwise what it logged last.
    """

    def __init__(self, name: str = "training", metric: str = "loss", shown: bool = True):
        self.name, self.metric, self.shown = name, metric, shown
        self.line: Line | None = None
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
        """End the line, also after an error."""
        if self.line is not None:
            self.line.close()

    def on_train_end(self, args, state, control, **kwargs):
        self.close()
