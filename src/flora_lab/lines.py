"""One line that shows how far something is.

On a terminal it is drawn anew twice a second and fits into 80 columns. In a file, which keeps every state of it, there
is one line per minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from typing import TextIO, TypeVar

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


def counted(items: Iterable[Item], total: int, name: str) -> Generator[Item, None, None]:
    """The items. If they take long, a line of the first process shows how many of ``total`` have passed."""
    start, line, done = time.monotonic(), None, 0
    try:
        for done, item in enumerate(items, 1):
            yield item
            if line is None and time.monotonic() - start >= PATIENCE:
                line = Line(name, total, done, _is_first_process())
            if line is not None and line.due():
                line.draw(done, "")
    finally:
        if line is not None:
            line.draw(done, "")
            line.close()


def _is_first_process() -> bool:
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
