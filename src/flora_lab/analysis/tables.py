"""Tables of results: for a terminal, a README (Markdown) and the page. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from flora_lab.analysis.fields import Row
from flora_lab.analysis.results import (
    LEVEL_SEEDS,
    SIGNIFICANT,
    Result,
    leading,
    left_out,
    main_budget,
    ordered,
    plain,
    score,
)
from flora_lab.analysis.style import styles

NONE = "–"
EDGES = {"lowest": " ↓", "highest": " ↑"}


@dataclass(frozen=True)
class Table:
    """Cells as text, line by line; the first column is aligned to the left, the others to the right."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)  # (line, column)
    note: str = ""

    def markdown(self) -> str:
        """Aligned, so that it reads well in a terminal too."""
        lines = [
            [f"**{cell}**" if (n, column) in self.bold else cell for column, cell in enumerate(line)]
            for n, line in enumerate(self.lines)
        ]
        widths = [max(map(len, column)) for column in zip(self.columns, *lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        align = [str.ljust] + [str.rjust] * (len(widths) - 1)
        return "\n".join(
            "| " + " | ".join(place(cell, width) for place, cell, width in zip(align, line, widths, strict=True)) + " |"
            for line in [self.columns, rule, *lines]
        )


# ---------------------------------------------------------------------------------------------- one trial per variant


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line per trial: what `flora train` prints."""
    metric, style = rows[0]["metric"], styles(rows)
    columns = [f"test {metric}", "trainable: adapter + head", "seconds", "on disk"]
    lines = [
        [
            style[row["job"], row["variant"]].label,
            f"{100 * score(row, 'test'):.1f} %",
            _parameters(row),
            f"{row['seconds']:.0f}",
            f"{row['bytes'] / 1024:,.0f} KiB",
        ]
        for row in rows
    ]
    return Table("", ["method", *columns], lines).markdown()


def summary(rows: Sequence[Row]) -> str:
    """The table, and below it the notes of each method and how exactly its adapter came back from disk."""
    lines, style = [table(rows), ""], styles(rows)
    for row in rows:
        name = style[row["job"], row["variant"]].label
        lines += [f"{name}: {note}" for note in row["notes"]]
        if "loaded_difference" in row:
            merged = row.get("merged_difference")
            lines.append(
                f"{name}: largest difference of an output, loaded from disk against trained "
                f"{row['loaded_difference']:.1e}, "
                + ("not merged: it can't" if merged is None else f"merged against loaded {merged:.1e}")
            )
    return "\n".join(lines).rstrip()


def _parameters(row: Row) -> str:
    return f"{row['adapter_parameters']:,} + {row['head_parameters']:,}"


# ------------------------------------------------------------------------------------------------------- a comparison


def factor(results: Iterable[Result]) -> int:
    """100 if all values of a job are shares or correlations, which are usually given in percent; else 1."""
    return 100 if all(abs(value) <= 1 for result in results for value in result.values.values()) else 1


def metric_name(results: Sequence[Result]) -> str:
    return f"{results[0].metric} × 100" if factor(results) == 100 else results[0].metric


def comparison(results: Sequence[Result]) -> Table:
    """One job, one line per variant and budget."""
    if not results:
        return Table("", ["method"], [])  # no variant could run
    times, results = factor(results), ordered(results)
    groups = [list(of) for budget, of in groupby(results, key=lambda r: r.budget) if budget is not None]
    best = [result for group in groups for result in leading(group)]
    bold = {(n, 2) for n, result in enumerate(results) if result in best}
    lines = [
        [
            result.label,
            budget(result),
            _plus_minus(result, times),
            probability(result.p, result.gain),
            _parameters(result.rows[0]),
            f"{result.learning_rate:g}" + EDGES.get(result.edge, ""),
            str(len(result.rows)),
            seconds(result.epoch_seconds),
            size(result.memory),
        ]
        for result in results
    ]
    columns = ["method", "budget", f"test {metric_name(results)}", "p vs FLoRA", "adapter + head", "learning rate"]
    columns += ["runs", "s / epoch", "peak memory"]
    return _without_empty(Table(results[0].job, columns, lines, bold, _note(results)))


def _note(results: Sequence[Result]) -> str:
    """How to read a comparison: only the marks that it has."""
    notes = [
        "Mean ± standard deviation over seeds. In bold the best at its budget and all that are level with it: a paired "
        f"t-test over {LEVEL_SEEDS} seeds or more does not tell them apart (p ≥ {SIGNIFICANT:g}). Fewer seeds: no bold."
    ]
    if any(result.p is not None for result in results):
        main = main_budget(result.budget for result in results)
        several = len({result.budget for result in results} - {None}) > 1
        at = f" of the same budget (or of {main:,}, without one)" if several else ""
        notes.append(f"p: paired t-test, ▲ above and ▼ below FLoRA{at} at p < {SIGNIFICANT:g}.")
    grids = dict.fromkeys((result.label, len(result.rates)) for result in results)
    usual = statistics.mode(rates for _, rates in grids)
    others = [f"{rates} with {name}" for name, rates in grids if rates != usual]
    if others:
        notes.append(f"Learning rates tried: {usual}, but {', '.join(others)}.")
    if any(result.edge for result in results):
        notes.append("↓ ↑: the lowest or highest learning rate of its grid, so a wider one may do better.")
    return " ".join(notes)


def further(results: Sequence[Result]) -> Table | None:
    """What else was measured on the test split, apart from the loss: means over seeds. None if there is nothing."""
    results = ordered(results)
    tested = [[row["test"] for row in result.rows] for result in results]
    shown = {"loss", *(result.metric for result in results)}
    names = dict.fromkeys(name for rows in tested for row in rows for name in row if name not in shown)
    if not names:
        return None
    lines = []
    for result, rows in zip(results, tested, strict=True):
        values = [[row[name] for row in rows if name in row] for name in names]
        cells = [f"{statistics.fmean(of):.4g}" if of else NONE for of in values]
        lines.append([result.label, budget(result), *cells])
    columns = ["method", "budget", *names]
    return _without_empty(Table(results[0].job, columns, lines, note="Test split, means over seeds."))


def costs(results: Sequence[Result]) -> Table:
    """Time of an epoch and peak memory, absolute and relative to LoRA's (paper, Table 4)."""
    lines = []
    results = ordered(results)
    lora = plain(results, "lora")
    for result in results:
        same = [other for other in lora if result.budget in (None, other.budget)]
        reference = same[0] if same else None
        lines.append(
            [
                result.label,
                budget(result),
                seconds(result.epoch_seconds),
                _ratio(result.epoch_seconds, reference and reference.epoch_seconds),
                size(result.memory),
                _ratio(result.memory, reference and reference.memory),
            ]
        )
    columns = ["method", "budget", "s / epoch", "× LoRA", "peak memory", "× LoRA"]
    note = (
        "Medians over seeds. × LoRA: over LoRA’s at the same budget, for a method without one at LoRA’s lowest. "
        "Runs that share a machine slow each other down."
    )
    return _without_empty(Table(results[0].job, columns, lines, note=note))


def remarks(rows: Sequence[Row]) -> list[str]:
    """What did not run, and why; then the notes of the methods. Each once, with the budgets that it holds for."""
    missing, style = {id(row) for row in left_out(rows)}, styles(rows)
    texts: dict[tuple[bool, str, str, str], list[int]] = {}
    for row in rows:
        ran = id(row) not in missing
        for text in (row.get("notes") or ()) if ran else [f"left out: {row['left_out']}"]:
            budgets = texts.setdefault((ran, row["job"], style[row["job"], row["variant"]].label, text), [])
            if row["budget"] is not None and row["budget"] not in budgets:
                budgets.append(row["budget"])
    lines = []
    for (_, job, name, text), budgets in sorted(texts.items(), key=lambda item: item[0][0]):
        at = f", budget {' / '.join(f'{budget:,}' for budget in sorted(budgets))}" if budgets else ""
        lines.append(f"{job}, {name}{at}: {text}")
    return lines


# -------------------------------------------------------------------------------------------------------------- cells


def budget(result: Result) -> str:
    return NONE if result.budget is None else f"{result.budget:,}"


def _plus_minus(result: Result, times: int) -> str:
    lost = sum(not math.isfinite(value) for value in result.values.values())
    if lost:
        return f"diverged ({lost} of {len(result.rows)})"
    spread = "" if result.std is None else f" ± {times * result.std:.2f}"
    return f"{times * result.mean:.2f}{spread}"


def probability(p: float | None, gain: float | None) -> str:
    """p of a test of a mean difference, ``gain``, with a mark if it is significant."""
    if p is None or gain is None:
        return NONE
    mark = ("▲" if gain > 0 else "▼") if p < SIGNIFICANT else ""
    return f"{'< 0.001' if p < 0.001 else f'{p:.3f}'} {mark}".rstrip()


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def _ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}" if value and reference else NONE


def _without_empty(table: Table) -> Table:
    """The table without the columns that have no value in any line."""
    kept = [n for n in range(len(table.columns)) if any(line[n] != NONE for line in table.lines)]
    return replace(
        table,
        columns=[table.columns[n] for n in kept],
        lines=[[line[n] for n in kept] for line in table.lines],
        bold={(line, kept.index(column)) for line, column in table.bold},
    )
