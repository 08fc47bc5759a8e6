"""Figures of what a trial records while it trains: learning curves, sizes of updates, spectra. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flora_lab.analysis.drawing import Curves, Picture, canvas, draw
from flora_lab.analysis.fields import Row
from flora_lab.analysis.results import Result, at_main_budget
from flora_lab.analysis.style import styles
from flora_lab.analysis.tables import factor, metric_name


def curves(results: Sequence[Result]) -> Picture | None:
    """Validation metric by epoch, one line per variant."""
    kept, at = at_main_budget(results)
    times = factor(kept)
    lines = _means(kept, lambda row: [(epoch, times * value) for epoch, value in row.get("curve") or ()])
    if len(lines) < 2 or max(map(len, lines.values())) < 2:
        return None
    chart, axes = canvas()
    draw(axes, lines)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="epoch", ylabel=f"validation {metric_name(kept)}")
    return Picture(results[0].job, "curves", "Learning curves", f"Means over seeds, {at}.", chart)


def norms(results: Sequence[Result]) -> Picture | None:
    """Size of the updates, and amplification, during training (paper, Fig. 4)."""
    kept, at = at_main_budget(results)
    panels = [
        ("mean ‖ΔW‖", _means(kept, lambda row: [(step, size) for step, size, _ in row.get("norms") or ()])),
        ("mean amplification", _means(kept, lambda row: [(step, by) for step, _, by in row.get("norms") or ()])),
    ]
    if not panels[0][1]:
        return None
    chart, *both = canvas(panels=2, height=5.6)
    for axes, (name, lines) in zip(both, panels, strict=True):
        draw(axes, lines, log=_spread(lines) > 20)
        axes.set(ylabel=name)
    both[1].set(xlabel="step")
    caption = (
        "Above, the Frobenius norm of the update, mean over all weights; below, the feature amplification factor, the "
        "norm of ΔW over that of W projected on the range of each of ΔW’s mode unfoldings (for matrices the paper’s, "
        f"section 6.2.2). Means over seeds, {at}. BitFit and bottleneck adapters update no weight."
    )
    return Picture(results[0].job, "norms", "How updates grow", caption, chart)


def spectra(results: Sequence[Result]) -> Picture | None:
    """Singular values of updates and of FLoRA's cores, relative to the largest."""
    kept, at = at_main_budget(results)

    def lines_of(part: str, place: Callable[[int, int], float]) -> Curves:
        def points(row: Row) -> list[tuple[float, float]]:
            values = (row.get("spectra") or {}).get(part) or ()
            return [(place(n, len(values)), value) for n, value in enumerate(values)]

        return _means(kept, points)

    panels = [
        ("update", "singular value number", lines_of("delta", lambda n, _: n + 1)),
        ("core", "share of the ranks", lines_of("core", lambda n, count: n / max(1, count - 1))),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    chart, *axes_of = canvas(panels=len(panels), height=3.0 * len(panels))
    for axes, (part, place, lines) in zip(axes_of, panels, strict=True):
        draw(axes, lines, log=True, floor=1e-4)
        axes.set(xlabel=place, ylabel=f"{part}: value / largest")
    caption = (
        "Singular values over the largest, means over weights, modes and seeds. Update: along its two longest modes. "
        f"Core: along every mode, from the first rank to the last. {at[0].upper() + at[1:]}; below 0.0001 not shown."
    )
    return Picture(results[0].job, "spectra", "Spectra", caption, chart)


def figure(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Learning curves of one trial per variant, with their trainable parameters: what `flora train` leaves."""
    chart, axes = canvas(width=7.5, height=4.2)
    style = styles(rows)
    by_style = {style[row["job"], row["variant"]]: row for row in rows}
    sizes = {style: f"{row['adapter_parameters'] + row['head_parameters']:,}" for style, row in by_style.items()}
    names = {style: f"{style.label}  ({size})" for style, size in sizes.items()}
    draw(axes, {style: row["curve"] for style, row in by_style.items()}, names)
    axes.set(xlabel="epoch", ylabel=f"validation {metric}")
    axes.set_title("Adapting the base model to its new domain (trainable parameters)", loc="left", fontsize="medium")
    chart.savefig(path, dpi=160, format="png")


def _means(results: Iterable[Result], points: Callable[[Row], list[tuple[float, float]]]) -> Curves:
    """Means over seeds at each x that a row has, by variant."""
    lines: Curves = {}
    for result in sorted(results, key=lambda result: result.style.order):
        values: dict[float, list[float]] = {}
        for row in result.rows:
            for x, y in points(row):
                if math.isfinite(y):
                    values.setdefault(x, []).append(y)
        if values:
            lines[result.style] = [(x, statistics.fmean(values[x])) for x in sorted(values)]
    return lines


def _spread(lines: Curves) -> float:
    """Of the lines' last values, the largest over the smallest."""
    last = [points[-1][1] for points in lines.values() if points[-1][1] > 0]
    return max(last) / min(last) if last else 1.0
