"""From recorded rows to tables, figures and one page. ``measure`` is what a run records of its updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flora.files import replace_file
from flora_lab.analysis import page, plots, tables
from flora_lab.analysis.rows import Result, by_task, read, results


def analyse(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.html, table.md and every figure as PNG into ``out``; the page's path.

    ``paths``: results.jsonl files, or folders with some. Raises ValueError naming file and line of what is no row.
    """
    rows, out = read(paths), Path(out)
    found = results(rows)
    drawn = plots.pictures(found)
    for picture in drawn:
        with replace_file(out / picture.file) as file:
            picture.png(file)
    with replace_file(out / "table.md") as file:
        file.write_text(
            "\n".join(f"## {task}\n\n{text(of)}\n" for task, of in by_task(found).items()), encoding="utf-8"
        )
    report = out / "report.html"
    page.write(rows, report, drawn)
    return report


def text(results: Sequence[Result]) -> str:
    """The table of one task, and what its marks mean."""
    table = tables.comparison(results)
    return "\n\n".join(filter(None, [table.markdown(), table.note]))
