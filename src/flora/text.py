"""Text for the terminal: tables, and the name that was meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches


def sizes(numbers: Iterable[int]) -> str:
    """A shape or ranks, as "2×3×5"."""
    return "×".join(map(str, numbers))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]) -> str:
    """Columns of text under a line of headings.

    Args:
        head: the headings.
        rows: one cell per heading.
        right: the headings of the columns to align on the right, those of numbers.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        columns = zip(head, cells, widths, strict=True)
        aligned = (cell.rjust(width) if name in right else cell.ljust(width) for name, cell, width in columns)
        return "  ".join(aligned).rstrip()

    return "\n".join([line(head), line("─" * width for width in widths), *map(line, rows)])


def did_you_mean(name: str, known: Iterable[str], other_names: Mapping[str, str] | None = None) -> str:
    """The end of a message about an unknown name: "; did you mean 'r'?", or nothing.

    Args:
        known: the names that are accepted.
        other_names: what others call some of them.
    """
    close = [other for other in [(other_names or {}).get(name)] if other] or get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
