"""From recorded rows to tables, figures and one page. ``measure`` is what a trial records of its updates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flora.files import replace_file
from flora_lab.analysis import page, plots, tables
from flora_lab.analysis.results import Result, by_job, summarise
from flora_lab.analysis.rows import read


def analyse(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.html, table.md and every figure as PNG into the folder ``out``. Returns the page's path.

    ``paths``: results.jsonl files, or folders that have some. Raises ValueError, naming file and line, for a line that
    is not a valid row.
    """
    rows, out = read(Path(path).expanduser() for path in paths), Path(out).expanduser()
    results = summarise(rows)
    pictures = plots.pictures(results)
    for picture in pictures:
        with replace_file(out / picture.file) as file:
            picture.png(file)
    with replace_file(out / "table.md") as file:
        sections = (f"## {job}\n\n{text(of)}\n" for job, of in by_job(results).items())
        file.write_text("\n".join(sections), encoding="utf-8")
    report = out / "report.html"
    page.write(rows, report, pictures)
    return report


def text(results: Sequence[Result]) -> str:
    """The table of one job, and what its marks mean."""
    table = tables.comparison(results)
    return "\n\n".join(filter(None, [table.markdown(), table.note]))
