"""One line that shows how far something is.

On a terminal it is drawn anew twice a second and fits into 80 columns. In a file, which keeps every state of it, there
is one line per minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import ClassVar, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

ON_TERMINAL, IN_FILE = 0.5, 60.0  # seconds between two states of the line
FORMAT = "{desc} {bar} {n_fmt}/{total_fmt} {remaining} left{postfix}"
PATIENCE = 5.0  # seconds before a line is shown that may not be needed
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
    """A tqdm bar on stderr. The time left follows from the mean speed since the start, evaluations included.

    Attributes:
        hidden: whether no line is shown: in a process that works for another, which has a line itself.
    """

    hidden: ClassVar[bool] = False

    def __init__(self, name: str, total: int, initial: int, shown: bool, stays: bool = True):
        """``stays``: whether it is left on the terminal when it ends, even below another line."""
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
            leave=True if stays else None,
            disable=self.hidden or not shown,
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


class LateLine:
    """A line that is shown only by the first process, and only if what it counts takes long."""

    def __init__(self, name: str, total: int, shown: bool = True):
        self.name, self.total, self.shown = name, total, shown
        self.start, self.done = time.monotonic(), 0
        self.line: Line | None = None

    def advance(self) -> None:
        """Say that one more is done."""
        self.done += 1
        if self.line is None and time.monotonic() - self.start >= PATIENCE:
            self.line = Line(self.name, self.total, self.done, self.shown and _is_first_process(), stays=False)
        if self.line is not None and self.line.due():
            self.line.draw(self.done, "")

    def close(self) -> None:
        if self.line is not None:
            self.line.draw(self.done, "")
            self.line.close()


def counted(items: Iterable[Item], total: int, name: str) -> Generator[Item, None, None]:
    """The items. If they take long, a line of the first process shows how many of ``total`` have passed."""
    with closing(LateLine(name, total)) as line:
        for item in items:
            yield item
            line.advance()


def _is_first_process() -> bool:
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
