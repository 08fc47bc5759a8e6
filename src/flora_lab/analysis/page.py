"""One page with all tables and figures, and how they were made: no scripts, nothing to load from a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from flora.files import replace_file
from flora_lab.analysis import across
from flora_lab.analysis.drawing import Picture
from flora_lab.analysis.fields import Row
from flora_lab.analysis.figures import pictures
from flora_lab.analysis.results import by_job, summarise
from flora_lab.analysis.tables import Table, comparison, costs, further, remarks

TEMPLATE = "report.html.jinja"


def write(rows: Sequence[Row], path: Path, drawn: Sequence[Picture] | None = None) -> None:
    """Write the page of these rows to ``path``. ``drawn``: their figures, if they have been made already."""
    results = summarise(rows)
    drawn = pictures(results) if drawn is None else drawn
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template(TEMPLATE).render(
        jobs=[
            {
                "name": job,
                "table": _html(comparison(of)),
                "costs": _html(costs(of)),
                "further": (table := further(of)) and _html(table),
                "pictures": [_inline(picture) for picture in drawn if picture.job == job],
            }
            for job, of in by_job(results).items()
        ],
        pairs=(table := across.pairs(results)) and _html(table),
        across=[_inline(picture) for picture in drawn if picture.job is None],
        remarks=remarks(rows),
        facts=facts(rows),
    )
    with replace_file(path) as file:
        file.write_text(text, encoding="utf-8")


def facts(rows: Sequence[Row]) -> list[str]:
    """What was run, on which machines, and for how long."""
    ran = [row for row in rows if "left_out" not in row]
    variants, seeds = {row["variant"] for row in ran}, {row["seed"] for row in ran}
    hours = sum(row.get("seconds") or 0 for row in ran) / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    lines = [f"{len(variants)} methods, {len(seeds)} seeds: {len(ran)} runs, {time} of training."]
    return lines + [f"Ran on: {machine}" for machine in dict.fromkeys(row.get("machine") for row in ran) if machine]


def _html(table: Table) -> dict:
    """For the template: each cell and whether it is bold; for each line, whether it starts a new budget."""
    lines = []
    for n, line in enumerate(table.lines):
        new = n > 0 and "budget" in table.columns and line[1] != table.lines[n - 1][1]
        lines.append({"new": new, "cells": [(cell, (n, column) in table.bold) for column, cell in enumerate(line)]})
    return {"columns": table.columns, "lines": lines, "note": table.note}


def _inline(picture: Picture) -> dict:
    return {"title": picture.title, "caption": picture.caption, "svg": jinja2.utils.markupsafe.Markup(picture.svg())}
