"""Every figure, one function each; matplotlib's objects without pyplot. No torch.

Each figure's caption says what it shows, and of which trials. A figure without any recorded values is not made.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from flora_lab.analysis.drawing import (
    LEGEND,
    LINE,
    Curves,
    Picture,
    canvas,
    dots,
    draw,
    folded,
    mean_bars,
    pen,
    ticks_at,
)
from flora_lab.analysis.fields import Row
from flora_lab.analysis.grid import grid
from flora_lab.analysis.results import Result, at_main_budget, by_job, ordered
from flora_lab.analysis.style import FLORA, GRID, INK, Style, styles
from flora_lab.analysis.tables import factor, metric_name

ENDS = ("full", "head")  # methods at 1 and 0 of the normalised gain
JOB_MARKERS = "os^DvPX*<>ph"


def pictures(results: Sequence[Result]) -> list[Picture]:
    """Every figure that can be made of the results: job by job, then those of all jobs."""
    results = [result for result in results if math.isfinite(result.mean)]  # the table says which diverged
    swept = [result for result in results if result.scale is not None]  # they would hide the other variants
    made: list[Picture | None] = []
    for of in by_job(results).values():
        variants = [result for result in of if result not in swept]
        made += [methods(variants), budgets(variants), scales(of), grid(variants)]
        made += [curves(variants), norms(variants), spectra(variants)]
    others = [result for result in results if result not in swept]
    return [picture for picture in (*made, radar(others), gains(others)) if picture]


# ------------------------------------------------------------------------------------------------------------ one job


def methods(results: Sequence[Result]) -> Picture | None:
    """Every variant: a point per seed, mean and standard deviation beside; grouped by budget, the best on top."""
    if len(results) < 2:
        return None
    times, lines = factor(results), []
    chart, axes = canvas(grid="x")
    for budget, of in itertools.groupby(ordered(results), key=lambda result: result.budget):
        lines.append("no budget" if budget is None else f"budget {budget:,}")
        of = sorted(of, key=lambda result: -result.mean)
        for level in (times * result.mean for result in of if result.style.ours):
            axes.plot([level] * 2, [len(lines) - 0.4, len(lines) + len(of) - 0.6], ":", color=FLORA.colour)
        for result in of:
            values = [times * value for value in result.values.values()]
            axes.plot(values, [len(lines)] * len(values), ".", color=result.style.colour, alpha=0.5, markersize=5)
            bar = {"xerr": times * result.std} if result.std is not None else {}
            axes.errorbar(times * result.mean, len(lines), **bar, **pen(result.style, 6.5) | {"linewidth": 1.4})
            lines.append(result.style)
    dots(axes, lines)
    axes.set(xlabel=f"test {metric_name(results)}")
    caption = (
        "Small points: one seed each. Marker and bar: mean and standard deviation over seeds. Dotted: FLoRA at that "
        "budget."
    )
    return Picture(results[0].job, "methods", "Every method", caption, chart)


def budgets(results: Sequence[Result]) -> Picture | None:
    """Metric against the number of trainable parameters (paper, Fig. 3)."""
    lines: dict[Style, list[tuple[float, Result]]] = {}
    for result in ordered(results):
        if result.budget is not None:
            lines.setdefault(result.style, []).append((result.rows[0]["adapter_parameters"], result))
    lines = {style: of for style, of in lines.items() if len(of) > 1}
    if not lines:
        return None
    full = [(result.style, result) for result in results if result.method == "full"]
    chart, axes = canvas()
    tried = {result.budget for of in lines.values() for _, result in of}
    mean_bars(axes, lines, full, tried, factor(results))
    axes.set(xlabel="trainable parameters of the adapter", ylabel=f"test {metric_name(results)}")
    caption = "Mean and standard deviation over seeds, at the true numbers of parameters; ticks at the budgets."
    return Picture(results[0].job, "budgets", "Rank sweep", caption, chart)


def scales(results: Sequence[Result]) -> Picture | None:
    """Metric against the scale s, for variants of FLoRA whose options give it as a number (paper, Fig. 5)."""
    swept = [(scale, result) for result in ordered(results) if (scale := result.scale) is not None]
    several = len({result.budget for _, result in swept}) > 1
    lines: dict[Style, list[tuple[float, Result]]] = {}
    automatic, dashes = [], itertools.cycle(("-", "--", ":", "-."))
    for budget, of in itertools.groupby(swept, key=lambda pair: pair[1].budget):
        at = f", budget {budget:,}" if several else ""
        style = replace(FLORA, label=f"scale s{at}", dashes=next(dashes))
        lines[style] = list(of)
        level = replace(style, label=f"automatic{at}", colour=INK, plain=False)
        automatic += [(level, result) for result in results if result.style.ours and result.budget == budget]
    lines = {style: of for style, of in lines.items() if len(of) > 1}
    if not lines:
        return None
    chart, axes = canvas()
    mean_bars(axes, lines, automatic, {scale for scale, _ in swept}, factor(results))
    axes.set(xlabel="scale s", ylabel=f"test {metric_name(results)}")
    caption = "FLoRA, the scale given as a number or automatic: mean and standard deviation over seeds."
    return Picture(results[0].job, "scales", "Scale sweep", caption, chart)


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
    return Picture(results[0].job, "curves", "Learning curves", f"Means over seeds, {at}.", chart, at)


def norms(results: Sequence[Result]) -> Picture | None:
    """Size of the updates, and amplification, during training (paper, Fig. 4)."""
    kept, at = at_main_budget(results)
    sizes = _means(kept, lambda row: [(step, size) for step, size, _ in row.get("norms") or ()])
    amplifications = _means(kept, lambda row: [(step, factor) for step, _, factor in row.get("norms") or ()])
    if not sizes:
        return None
    chart, above, below = canvas(panels=2, height=5.6)
    draw(above, sizes, log=True)
    draw(below, amplifications, log=True)
    above.set(ylabel="mean ‖ΔW‖")
    below.set(ylabel="mean amplification", xlabel="step")
    caption = (
        "Above, the Frobenius norm of the update, mean over all weights; below, the feature amplification factor, the "
        "norm of ΔW over that of W projected on the range of each of ΔW’s mode unfoldings (for matrices the paper’s, "
        f"section 6.2.2). Means over seeds, {at}. BitFit and bottleneck adapters update no weight. "
        "What is below a ten-thousandth of the largest is not drawn."
    )
    return Picture(results[0].job, "norms", "How updates grow", caption, chart, at)


def spectra(results: Sequence[Result]) -> Picture | None:
    """Singular values of updates and of FLoRA's cores, relative to the largest."""
    kept, at = at_main_budget(results)

    def values(row: Row, part: str) -> list[float]:
        return (row.get("spectra") or {}).get(part) or []

    last = max((len(values(row, "core")) - 1 for result in kept for row in result.rows), default=0)
    updates = _means(kept, lambda row: list(enumerate(_unpadded(values(row, "delta")), 1)))
    cores = _means(kept, lambda row: [(n / max(1, last), value) for n, value in enumerate(values(row, "core"))])
    panels = [("update", "singular value number", updates), ("core", "share of the ranks", cores)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    chart, *axes_of = canvas(panels=len(panels), height=3.0 * len(panels))
    for axes, (part, place, lines) in zip(axes_of, panels, strict=True):
        longest = max(points[-1][0] for points in lines.values())
        axes.set_xscale("log" if longest > 1 else "linear")  # ranks differ by far
        draw(axes, lines, log=True)
        if longest > 1:
            ticks_at(axes, [2**n for n in range(int(math.log2(longest)) + 1)])
        axes.set(xlabel=place, ylabel=f"{part}: value / largest")
    caption = (
        "Singular values over the largest, means over weights, modes and seeds. Update: along its two longest modes, "
        "of the weights of at least median rank, up to that rank. Core: along every mode, from the first rank to the "
        f"last. {at[0].upper() + at[1:]}."
    )
    return Picture(results[0].job, "spectra", "Spectra", caption, chart, at)


def trained(rows: Sequence[Row], metric: str, path: Path) -> None:
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


# ----------------------------------------------------------------------------------------------------------- all jobs

GAIN = (
    "0 is head only, 1 is full fine-tuning; test means over seeds, at the budget that most methods ran. A task is left "
    "out if it did not run both, or if full fine-tuning is not above head only."
)


def radar(results: Sequence[Result]) -> Picture | None:
    """Normalised gain over three or more jobs that compare several variants (paper, Fig. 2)."""
    jobs, lines = _gains(results)
    if not lines:
        return None
    chart, axes = canvas(polar=True, height=5.2)
    angles = [2 * math.pi * n / len(jobs) for n in range(len(jobs) + 1)]
    for style, values in lines.items():
        axes.plot(angles, [*values, values[0]], **pen(style), label=style.label)
        if style.ours:
            axes.fill(angles, [*values, values[0]], color=style.colour, alpha=0.12)
    every = [value for values in lines.values() for value in values]
    axes.set_ylim(min(0.0, *every) - 0.02, max(1.0, *every) * 1.05)
    axes.set_xticks(angles[:-1], [folded(job) for job in jobs])
    axes.set_theta_offset(math.pi / 2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_rlabel_position(math.degrees(angles[1]) / 2)
    axes.tick_params(axis="y", labelsize=9)
    for text, angle in zip(axes.get_xticklabels(), angles, strict=False):
        text.set_horizontalalignment("center" if abs(math.sin(angle)) < 0.1 else "right" if angle < math.pi else "left")
    axes.tick_params(axis="x", pad=2)
    chart.get_layout_engine().set(rect=(0, 0, 1, 0.96))  # it does not know of the label on top
    chart.legend(loc="outside lower center", **LEGEND)
    return Picture(None, "gains", "Normalised gain by task", GAIN, chart)


def gains(results: Sequence[Result]) -> Picture | None:
    """The radar's numbers on one axis: a line per method, a point per job."""
    jobs, lines = _gains(results)
    if not lines:
        return None
    chart, axes = canvas(grid="x")
    ranked = sorted(lines, key=lambda style: -statistics.fmean(lines[style]))
    for place, style in enumerate(ranked):
        for value, marker in zip(lines[style], itertools.cycle(JOB_MARKERS), strict=False):
            axes.plot(value, place, marker, color=style.colour, alpha=0.75, markersize=6)
        axes.plot(statistics.fmean(lines[style]), place, "|", color=style.colour, markersize=11, markeredgewidth=2.2)
    for job, marker in zip(jobs, itertools.cycle(JOB_MARKERS), strict=False):
        axes.plot([], [], marker, color=GRID, label=job)
    for end in (0, 1):
        axes.axvline(end, color=INK, linewidth=0.8, linestyle=":")
    dots(axes, ranked)
    chart.set_figheight(chart.get_figheight() + LINE * (1 + len(jobs) / 2))
    axes.set(xlabel="normalised gain")
    chart.legend(loc="outside lower center", **LEGEND)
    caption = "The same numbers: a marker per task, a bar at the mean over tasks."
    return Picture(None, "gain-dots", "Normalised gain by method", caption, chart)


# ------------------------------------------------------------------------------------------------------------ numbers


def _gains(results: Sequence[Result]) -> tuple[list[str], dict[Style, list[float]]]:
    """The jobs with full fine-tuning above head only, and of every variant that all have, its normalised gain on each.

    No variants for fewer than three jobs.
    """
    jobs: list[str] = []
    found: dict[str, list[float]] = {}  # by label: a variant's name may differ between jobs
    style: dict[str, Style] = {}
    for job, of in by_job(results).items():
        kept, _ = at_main_budget(of)
        ends = {result.method: result.mean for result in kept if result.style.plain}
        low, high = ends.get("head", math.nan), ends.get("full", math.nan)
        if not high > low:
            continue
        jobs.append(job)
        for result in kept:
            style[result.label] = result.style
            found.setdefault(result.label, []).append((result.mean - low) / (high - low))
    complete = [style[label] for label in found if len(found[label]) == len(jobs) and style[label].method not in ENDS]
    complete = sorted(complete, key=lambda style: style.order) if len(jobs) >= 3 else []
    return jobs, {style: found[style.label] for style in complete}


def _means(results: Iterable[Result], points: Callable[[Row], list[tuple[float, float]]]) -> Curves:
    """Means over seeds by variant, at each x where most rows that have points have a finite one."""
    lines: Curves = {}
    for result in sorted(results, key=lambda result: result.style.order):
        rows = [of for row in result.rows if (of := points(row))]
        values: dict[float, list[float]] = {}
        for x, y in itertools.chain.from_iterable(rows):
            if math.isfinite(y):
                values.setdefault(x, []).append(y)
        if kept := [x for x in sorted(values) if 2 * len(values[x]) > len(rows)]:
            lines[result.style] = [(x, statistics.fmean(values[x])) for x in kept]
    return lines


def _unpadded(values: list[float]) -> list[float]:
    """Older rows hold zeros for the ranks that a weight does not have, also in the mean: cut where it falls to them."""
    if not values or values[-1] > 1e-5:
        return values
    return values[: next((n for n in range(1, len(values)) if values[n] < values[n - 1] / 10), len(values))]
