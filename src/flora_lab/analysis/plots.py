"""Figures of test metrics, and the list of all figures; matplotlib's objects without pyplot. No torch.

Each figure's caption says what it shows, and of which trials. A figure without any recorded values is not made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from flora_lab.analysis.drawing import GRID, INK, LEGEND, Picture, canvas, folded, name_ends, pen, plain_ticks, size
from flora_lab.analysis.results import Result, at_main_budget, by_job, ordered
from flora_lab.analysis.style import FLORA, OURS, Style
from flora_lab.analysis.tables import factor, metric_name
from flora_lab.analysis.traces import curves, norms, spectra

ENDS = ("full", "head")  # methods at 1 and 0 of the normalised gain


def pictures(results: Sequence[Result]) -> list[Picture]:
    """Every figure that can be made of the results: job by job, then those of all jobs."""
    results = [result for result in results if math.isfinite(result.mean)]  # the table says which diverged
    made = []
    for of in by_job(results).values():
        variants = _without_scales(of)
        made += [dots(variants), sweep(variants), scales(of), curves(variants), norms(variants), spectra(variants)]
    return [picture for picture in (*made, radar(_without_scales(results))) if picture]


# ------------------------------------------------------------------------------------------------------------ one job


def dots(results: Sequence[Result]) -> Picture | None:
    """Every variant: a point per seed, mean and standard deviation beside; grouped by budget, the best on top."""
    if len(results) < 2:
        return None
    groups = [
        (budget, sorted(of, key=lambda result: -result.mean))
        for budget, of in itertools.groupby(ordered(results), key=lambda result: result.budget)
    ]
    chart, axes = canvas(height=0.75 + 0.215 * sum(len(of) + 1 for _, of in groups))
    at, ticks = 0.0, []
    for budget, of in groups:
        title = "no budget" if budget is None else f"budget {budget:,}"
        ticks += _dots_of_group(axes, of, title, at, factor(results))
        at += len(of) + 1
    axes.set_yticks([place for place, _ in ticks], [style.label for _, style in ticks])
    for tick, (_, style) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_fontweight("bold" if style.ours else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(at - 0.3, -0.7), xlabel=f"test {metric_name(results)}")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, alpha=0.3)
    caption = (
        "Small points: one seed each. Marker and bar: mean and standard deviation over seeds. Dotted: FLoRA at that "
        "budget."
    )
    return Picture(results[0].job, "methods", "Every method", caption, chart)


def _dots_of_group(axes: Any, of: list[Result], title: str, at: float, times: int) -> list[tuple[float, Style]]:
    """Draw a title and one line per result below the height ``at``; where the lines are."""
    name = {"va": "center", "color": INK, "fontsize": 9, "fontstyle": "italic"}
    axes.text(0.01, at, title, transform=axes.get_yaxis_transform(), **name)
    ours = [result for result in of if result.style.ours]
    if ours:
        x = times * ours[0].mean
        axes.plot([x, x], [at + 0.6, at + len(of) + 0.4], ":", color=ours[0].style.colour, linewidth=1.2)
    for place, result in enumerate(of, 1):
        colour, marker = result.style.colour, result.style.marker
        values = [times * value for value in result.values.values()]
        axes.plot(values, [at + place] * len(values), ".", color=colour, alpha=0.5, markersize=5, zorder=2)
        bar = {"xerr": times * result.std} if result.std is not None else {}
        mark = {"color": colour, "marker": marker, "markersize": size(result.style, 6.5), "linewidth": 1.4}
        axes.errorbar(times * result.mean, at + place, zorder=3, **bar, **mark)
    return [(at + place, result.style) for place, result in enumerate(of, 1)]


def sweep(results: Sequence[Result]) -> Picture | None:
    """Metric against the number of trainable parameters (paper, Fig. 3)."""
    lines: dict[Style, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.style.order):
        if result.budget is not None:
            lines.setdefault(result.style, []).append(result)
    lines = {style: of for style, of in lines.items() if len(of) > 1}
    if not lines:
        return None
    times = factor(results)
    chart, axes = canvas()
    ends = {}
    for style, of in lines.items():
        of = sorted(of, key=lambda result: result.rows[0]["adapter_parameters"])
        sizes = [result.rows[0]["adapter_parameters"] for result in of]
        means = [times * result.mean for result in of]
        spread = [times * (result.std or 0) for result in of]
        axes.errorbar(sizes, means, yerr=spread, **pen(style), elinewidth=0.8, capsize=2)
        ends[style] = (sizes[-1], means[-1])
    axes.set_xscale("log")
    plain_ticks(axes)
    full = [result for result in results if result.method == "full"]
    for result in full:
        axes.axhline(times * result.mean, color=result.style.colour, linestyle="--", linewidth=1.2)
        ends[result.style] = (axes.get_xlim()[1], times * result.mean)
    axes.set(xlabel="trainable parameters of the adapter", ylabel=f"test {metric_name(results)}")
    name_ends(axes, ends)
    caption = "Mean and standard deviation over seeds, at the true numbers of parameters."
    caption += " Dashed: full fine-tuning." if full else ""
    return Picture(results[0].job, "budgets", "Rank sweep", caption, chart)


def scales(results: Sequence[Result]) -> Picture | None:
    """Metric against the scale s, for variants of FLoRA whose options give it as a number (paper, Fig. 5)."""
    lines: dict[Any, list[tuple[float, Result]]] = {}
    for result in results:
        if (scale := _scale(result)) is not None:
            lines.setdefault(result.budget, []).append((scale, result))
    lines = {budget: of for budget, of in lines.items() if len(of) > 1}
    if not lines:
        return None
    times = factor(results)
    chart, axes = canvas()
    dashes = itertools.cycle(["-", "--", ":", "-."])
    for (budget, of), dash in zip(lines.items(), dashes, strict=False):
        of.sort(key=lambda pair: pair[0])
        means = [times * result.mean for _, result in of]
        spread = [times * (result.std or 0) for _, result in of]
        text = "a number" if len(lines) == 1 else f"a number, budget {budget:,}"
        line = {**pen(FLORA), "linestyle": dash, "label": text}
        axes.errorbar([scale for scale, _ in of], means, yerr=spread, capsize=2, **line)
        for result in results:
            if result.style.ours and result.budget == budget and _scale(result) is None:
                text = "automatic" if len(lines) == 1 else f"automatic, budget {budget:,}"
                axes.axhline(times * result.mean, color=GRID, linestyle=dash, linewidth=1.4, label=text)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="scale s", ylabel=f"test {metric_name(results)}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), **LEGEND)
    caption = "FLoRA, the scale given as a number or automatic: mean and standard deviation over seeds."
    return Picture(results[0].job, "scales", "Scale sweep", caption, chart)


def _scale(result: Result) -> float | None:
    """The scale s that the variant's options give as a number."""
    scale = (result.rows[0].get("options") or {}).get("scale")
    return scale if result.method == OURS and isinstance(scale, int | float) and scale > 0 else None


def _without_scales(results: Iterable[Result]) -> list[Result]:
    """Without the points of a scale sweep, which would hide the other variants."""
    return [result for result in results if _scale(result) is None]


# ----------------------------------------------------------------------------------------------------------- all jobs


def radar(results: Sequence[Result]) -> Picture | None:
    """Normalised gain over three or more jobs that compare several variants (paper, Fig. 2)."""
    jobs = {job: of for job, of in by_job(results).items() if len({result.variant for result in of}) > 1}
    gains = _gains(jobs)
    if len(jobs) < 3 or not gains:
        return None
    chart, axes = canvas(polar=True, height=5.2)
    angles = [2 * math.pi * n / len(jobs) for n in range(len(jobs) + 1)]
    for style, values in gains.items():
        axes.plot(angles, [*values, values[0]], **pen(style), label=style.label)
        if style.ours:
            axes.fill(angles, [*values, values[0]], color=style.colour, alpha=0.12)
    every = [value for values in gains.values() for value in values]
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
    caption = (
        "0 is head only, 1 is full fine-tuning (the worst and the best method where those were not run, or where full "
        "fine-tuning is not above head only); test means over seeds, every task at the budget that most methods ran."
    )
    return Picture(None, "gains", "Normalised gain by task", caption, chart)


def _gains(jobs: dict[str, list[Result]]) -> dict[Style, list[float]]:
    """The normalised gain on each job, of every variant that all of them have."""
    gains: dict[str, list[float]] = {}  # by label: a variant's name may differ between jobs
    style: dict[str, Style] = {}
    for of in jobs.values():
        kept, _ = at_main_budget(of)
        ends = {result.method: result.mean for result in kept if result.style.plain}
        means = [result.mean for result in kept]
        low, high = ends.get("head", min(means)), ends.get("full", max(means))
        if high <= low:
            low, high = min(means), max(means)
        for result in kept:
            style[result.label] = result.style
            gains.setdefault(result.label, []).append((result.mean - low) / (high - low) if high > low else 0.0)
    complete = [style[label] for label in gains if len(gains[label]) == len(jobs) and style[label].method not in ENDS]
    return {style: gains[style.label] for style in sorted(complete, key=lambda style: style.order)}
