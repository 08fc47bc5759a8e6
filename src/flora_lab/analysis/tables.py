"""Tables of results: for a terminal, a README (Markdown) and the page. Plain rows, no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from flora_lab.analysis.rows import SIGNIFICANT, Result, Row, finite, left_out, main_budget, score
from flora_lab.analysis.style import label, order

NONE = "–"
EDGES = {"lowest": " ↓", "highest": " ↑"}


@dataclass(frozen=True)
class Table:
    """Cells as a person reads them; the first column is text, the others are numbers."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)  # (line, column)
    note: str = ""

    def markdown(self) -> str:
        """Aligned: the same text reads well in a terminal and in a README."""
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


# ------------------------------------------------------------------------------------------------- one run a method


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a run: what `flora train` prints."""
    metric = rows[0]["metric"]
    columns = [f"test {metric}", "trainable: adapter + head", "seconds", "on disk"]
    lines = [
        [
            label(row["method"]),
            f"{100 * score(row, 'test'):.1f} %",
            _parameters(row),
            f"{row['seconds']:.0f}",
            f"{row['bytes'] / 1024:,.0f} KiB",
        ]
        for row in rows
    ]
    return Table("", ["method", *columns], lines).markdown()


def summary(rows: Sequence[Row]) -> str:
    """The table, and below it what each method says of itself."""
    lines = [table(rows), ""]
    for row in rows:
        name = label(row["method"])
        lines += [f"{name}: {note}" for note in row["notes"]]
        if "loaded_difference" in row:
            lines.append(
                f"{name}: largest difference of an output, loaded from disk against trained "
                f"{row['loaded_difference']:.1e}, merged against loaded {row['merged_difference']:.1e}"
            )
    return "\n".join(lines).rstrip()


def _parameters(row: Row) -> str:
    return f"{row['adapter_parameters']:,} + {row['head_parameters']:,}"


# --------------------------------------------------------------------------------------------------- a comparison


def factor(results: Iterable[Result]) -> int:
    """100 where all of a task's values are shares or correlations, which the field reports that way; else 1."""
    return 100 if all(abs(value) <= 1 for result in results for value in result.values.values()) else 1


def metric_name(results: Sequence[Result]) -> str:
    return f"{results[0].metric} × 100" if factor(results) == 100 else results[0].metric


def ordered(results: Iterable[Result]) -> list[Result]:
    """By budget, none first; in a budget as ``style.order`` has it."""
    return sorted(results, key=lambda result: (result.budget or 0, order(result.method)))


def comparison(results: Sequence[Result]) -> Table:
    """One task, a line a method and budget."""
    if not results:
        return Table("", ["method"], [])  # nothing could run
    times = factor(results)
    cost = ["adapter + head", "learning rate", "runs", "s / epoch", "peak memory"]
    results = ordered(results)
    best = {r.budget: max((o.mean for o in results if o.budget == r.budget), key=finite) for r in results}
    main = main_budget(result.budget for result in results)
    lines, bold = [], set()
    for n, result in enumerate(results):
        if result.budget is not None and result.mean == best[result.budget]:
            bold.add((n, 2))
        lines.append(
            [
                label(result.method),
                budget(result),
                _plus_minus(result, times),
                _p(result),
                _parameters(result.runs[0]),
                f"{result.learning_rate:g}" + EDGES.get(result.edge, ""),
                str(len(result.runs)),
                seconds(result.epoch_seconds),
                size(result.memory),
            ]
        )
    notes = ["Mean ± standard deviation over seeds; in bold the best at its budget."]
    if any(result.p is not None for result in results):
        at = f" of the same budget (or of {main:,}, without one)" if len(best.keys() - {None}) > 1 else ""
        notes.append(f"p: paired t-test, ▲ above and ▼ below FLoRA{at} at p < {SIGNIFICANT:g}.")
    tried = dict.fromkeys((label(result.method), len(result.rates)) for result in results)
    usual = statistics.mode(rates for _, rates in tried)
    others = [f"{rates} with {name}" for name, rates in tried if rates != usual]
    if others:
        notes.append(f"Learning rates tried: {usual}, but {', '.join(others)}.")
    if any(result.edge for result in results):
        notes.append("↓ ↑: the lowest or highest learning rate of its grid, so a wider one may do better.")
    columns = ["method", "budget", f"test {metric_name(results)}", "p vs FLoRA", *cost]
    return _without_empty(Table(results[0].task, columns, lines, bold, " ".join(notes)))


def costs(results: Sequence[Result]) -> Table:
    """Time of an epoch and peak memory, as they are and over LoRA's (paper, Table 4)."""
    lines = []
    results = ordered(results)
    for result in results:
        same = [r for r in results if r.method == "lora" and (result.budget is None or r.budget == result.budget)]
        reference = same[0] if same else None
        lines.append(
            [
                label(result.method),
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
    return _without_empty(Table(results[0].task, columns, lines, note=note))


def remarks(rows: Sequence[Row]) -> list[str]:
    """What did not run, and why; then what the methods say of themselves. Each once, with the budgets it holds for."""
    missing = {id(row) for row in left_out(rows)}
    said: dict[tuple[bool, str, str, str], list[int]] = {}
    for row in rows:
        told = [f"left out: {row['left_out']}"] if id(row) in missing else row.get("notes") or ()
        for text in told:
            budgets = said.setdefault((id(row) not in missing, row["task"], row["method"], text), [])
            if row["budget"] is not None and row["budget"] not in budgets:
                budgets.append(row["budget"])
    lines = []
    for (_, task, method, text), budgets in sorted(said.items(), key=lambda item: item[0][0]):
        at = f", budget {' / '.join(f'{budget:,}' for budget in sorted(budgets))}" if budgets else ""
        lines.append(f"{task}, {label(method)}{at}: {text}")
    return lines


def budget(result: Result) -> str:
    return NONE if result.budget is None else f"{result.budget:,}"


def _plus_minus(result: Result, times: int) -> str:
    lost = sum(not math.isfinite(value) for value in result.values.values())
    if lost:
        return f"diverged ({lost} of {len(result.runs)})"
    spread = "" if result.std is None else f" ± {times * result.std:.2f}"
    return f"{times * result.mean:.2f}{spread}"


def _p(result: Result) -> str:
    if result.p is None:
        return NONE
    mark = ("▲" if result.gain > 0 else "▼") if result.p < SIGNIFICANT else ""
    return f"{'< 0.001' if result.p < 0.001 else f'{result.p:.3f}'} {mark}".rstrip()


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def _ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}" if value and reference else NONE


def _without_empty(table: Table) -> Table:
    """Columns that nothing is known of are not shown."""
    kept = [n for n in range(len(table.columns)) if any(line[n] != NONE for line in table.lines)]
    return replace(
        table,
        columns=[table.columns[n] for n in kept],
        lines=[[line[n] for n in kept] for line in table.lines],
        bold={(line, kept.index(column)) for line, column in table.bold},
    )
