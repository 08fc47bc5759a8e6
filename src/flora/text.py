"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


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
