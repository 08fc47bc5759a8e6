"""From recorded rows to tables, figures and one page. ``measure`` is what a trial records of its updates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flora.files import replace_file
from flora_lab.analysis import across, figures, page, peft_results, tables
from flora_lab.analysis.results import Result, by_job, summarise
from flora_lab.analysis.rows import read


def analyse(
    paths: Sequence[str | Path], out: str | Path, into: str | Path | None = None, peft: str | Path | None = None
) -> Path:
    """Write report.html, table.md and every figure as PNG into the folder ``out``. Returns the page's path.

    ``paths``: results.jsonl files, or folders that have some. ``into``: a Markdown file in which tables are replaced:
    each job's below the line "<!-- JOB -->", that of its further numbers below "<!-- JOB, further -->", and that of all
    pairs of runs of some jobs below "<!-- pairs: JOB, JOB -->"; then there is no table.md. ``peft``: a folder of
    results of PEFT's method comparison, which stand beside the rows in peft.md. Raises ValueError, naming file and
    line, for a line that is not a valid row, and for a job without its line in ``into``.
    """
    rows, out = read(Path(path).expanduser() for path in paths), Path(out).expanduser()
    results = summarise(rows)
    if into:
        _replace_tables(Path(into).expanduser(), by_job(results))
    if peft:
        table = peft_results.beside(rows, peft)
        with replace_file(out / "peft.md") as file:
            file.write_text(f"{table.markdown()}\n\n{table.note}\n", encoding="utf-8")
    pictures = figures.pictures(results)
    for picture in pictures:
        with replace_file(out / picture.file) as file:
            picture.png(file)
    if not into:
        with replace_file(out / "table.md") as file:
            sections = (f"## {job}\n\n{text(of)}\n{_further(of)}" for job, of in by_job(results).items())
            file.write_text("\n".join(sections), encoding="utf-8")
    report = out / "report.html"
    page.write(rows, report, pictures)
    return report


def text(results: Sequence[Result]) -> str:
    """The table of one job, and what its marks mean."""
    table = tables.comparison(results)
    return "\n\n".join(filter(None, [table.markdown(), table.note]))


def _further(results: Sequence[Result]) -> str:
    table = tables.further(results)
    return f"\n{table.markdown()}\n" if table else ""


def _replace_tables(file: Path, jobs: dict[str, list[Result]]) -> None:
    content = file.read_text(encoding="utf-8")
    made: dict[str, tables.Table | None] = {}
    for job, results in jobs.items():
        if f"<!-- {job} -->\n" not in content:
            raise ValueError(f"{file}: there is no line '<!-- {job} -->' to put the table of {job} below")
        made |= {job: tables.comparison(results), f"{job}, further": tables.further(results)}
    for names in re.findall(r"<!-- pairs: (.*) -->\n", content):
        if set(names.split(", ")) <= jobs.keys():
            made[f"pairs: {names}"] = across.pairs([result for job in names.split(", ") for result in jobs[job]])
    for name, table in made.items():
        mark = f"<!-- {name} -->\n"
        new = f"{mark}{table.markdown()}\n" if table else mark
        content = re.sub(rf"{re.escape(mark)}(\|.*\n)*", lambda _, new=new: new, content)
    with replace_file(file) as new:
        new.write_text(content, encoding="utf-8")
