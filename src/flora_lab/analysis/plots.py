"""Figures of recorded rows, matplotlib's objects without pyplot. No torch.

What a figure shows, and of which runs, its caption says. A figure that nothing was recorded for is not made.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flora_lab.analysis.drawing import (
    GRID,
    INK,
    LEGEND,
    Curves,
    Picture,
    canvas,
    draw,
    folded,
    name_ends,
    pen,
    plain_ticks,
    size,
)
from flora_lab.analysis.rows import Result, Row, by_task, main_budget
from flora_lab.analysis.style import OURS, label, look, order
from flora_lab.analysis.tables import factor, metric_name, ordered

ENDS = ("full", "head")  # 1 and 0 of the normalised gain


def pictures(results: Sequence[Result]) -> list[Picture]:
    """Every figure that there are rows for, task by task, then those of all tasks."""
    results = [result for result in results if math.isfinite(result.mean)]  # the table says what diverged
    found = []
    for of in by_task(results).values():
        methods = _methods(of)
        found += [dots(methods), sweep(methods), scales(of), curves(methods), norms(methods), spectra(methods)]
    return [picture for picture in (*found, radar(_methods(results))) if picture]


# ----------------------------------------------------------------------------------------------------- figures


def dots(results: Sequence[Result]) -> Picture | None:
    """Every method: each seed a point, mean and standard deviation beside; a group a budget, the best on top."""
    if len(results) < 2:
        return None
    times = factor(results)
    groups = [
        (budget, sorted(of, key=lambda result: -result.mean))
        for budget, of in itertools.groupby(ordered(results), key=lambda result: result.budget)
    ]
    rows = sum(len(of) + 1 for _, of in groups)
    chart, axes = canvas(height=0.75 + 0.215 * rows)
    at, ticks = 0.0, []
    for budget, of in groups:
        title = "no budget" if budget is None else f"budget {budget:,}"
        name = {"va": "center", "color": INK, "fontsize": 9, "fontstyle": "italic"}
        axes.text(0.01, at, title, transform=axes.get_yaxis_transform(), **name)
        ours = [result.mean for result in of if result.method == OURS]
        if ours:
            axes.plot([times * ours[0]] * 2, [at + 0.6, at + len(of) + 0.4], ":", color=look(OURS)[0], linewidth=1.2)
        for place, result in enumerate(of, 1):
            colour, marker = look(result.method)
            values = [times * value for value in result.values.values()]
            axes.plot(values, [at + place] * len(values), ".", color=colour, alpha=0.5, markersize=5, zorder=2)
            bar = {"xerr": times * result.std} if result.std is not None else {}
            mark = {"color": colour, "marker": marker, "markersize": size(result.method, 6.5), "linewidth": 1.4}
            axes.errorbar(times * result.mean, at + place, zorder=3, **bar, **mark)
            ticks.append((at + place, label(result.method), result.method))
        at += len(of) + 1
    axes.set_yticks([place for place, _, _ in ticks], [text for _, text, _ in ticks])
    for tick, (_, _, method) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_fontweight("bold" if method == OURS else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(at - 0.3, -0.7), xlabel=f"test {metric_name(results)}")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, alpha=0.3)
    caption = (
        "Small points: one seed each. Marker and bar: mean and standard deviation over seeds. Dotted: FLoRA at that "
        "budget."
    )
    return Picture(results[0].task, "methods", "Every method", caption, chart)


def sweep(results: Sequence[Result]) -> Picture | None:
    """Metric against the number of trainable parameters (paper, Fig. 3)."""
    lines = _by_method(result for result in results if result.budget is not None)
    lines = {method: of for method, of in lines.items() if len(of) > 1}
    if not lines:
        return None
    times = factor(results)
    chart, axes = canvas()
    ends = {}
    for method, of in lines.items():
        of = sorted(of, key=lambda result: result.runs[0]["adapter_parameters"])
        sizes = [result.runs[0]["adapter_parameters"] for result in of]
        means = [times * result.mean for result in of]
        spread = [times * (result.std or 0) for result in of]
        axes.errorbar(sizes, means, yerr=spread, **pen(method), elinewidth=0.8, capsize=2)
        ends[method] = (sizes[-1], means[-1])
    axes.set_xscale("log")
    plain_ticks(axes)
    for result in results:
        if result.method == "full":
            axes.axhline(times * result.mean, color=look(result.method)[0], linestyle="--", linewidth=1.2)
            ends[result.method] = (axes.get_xlim()[1], times * result.mean)
    axes.set(xlabel="trainable parameters of the adapter", ylabel=f"test {metric_name(results)}")
    name_ends(axes, ends)
    caption = "Mean and standard deviation over seeds, at the true numbers of parameters."
    if "full" in ends:
        caption += " Dashed: full fine-tuning."
    return Picture(results[0].task, "budgets", "Rank sweep", caption, chart)


def scales(results: Sequence[Result]) -> Picture | None:
    """Metric against the scale s, for the methods whose options give it as a number (paper, Fig. 5)."""
    lines: dict[Any, list[tuple[float, Result]]] = {}
    for result in results:
        scale = _scale(result)
        if scale is not None:
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
        line = {**pen(OURS), "linestyle": dash, "label": text}
        axes.errorbar([scale for scale, _ in of], means, yerr=spread, capsize=2, **line)
        for result in results:
            if result.method == OURS and result.budget == budget and _scale(result) is None:
                text = "automatic" if len(lines) == 1 else f"automatic, budget {budget:,}"
                axes.axhline(times * result.mean, color=GRID, linestyle=dash, linewidth=1.4, label=text)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="scale s", ylabel=f"test {metric_name(results)}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), **LEGEND)
    caption = "FLoRA, the scale given as a number or automatic: mean and standard deviation over seeds."
    return Picture(results[0].task, "scales", "Scale sweep", caption, chart)


def curves(results: Sequence[Result]) -> Picture | None:
    """Validation metric by epoch, a line a method."""
    of, at = _at_main_budget(results)
    times = factor(of)
    lines = _mean_curves(of, lambda run: [(epoch, times * value) for epoch, value in run.get("curve") or ()])
    if len(lines) < 2 or max(map(len, lines.values())) < 2:
        return None
    chart, axes = canvas()
    draw(axes, lines)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="epoch", ylabel=f"validation {metric_name(of)}")
    return Picture(results[0].task, "curves", "Learning curves", f"Means over seeds, {at}.", chart)


def norms(results: Sequence[Result]) -> Picture | None:
    """Size of the updates, and amplification, through training (paper, Fig. 4)."""
    of, at = _at_main_budget(results)
    panels = [
        ("mean ‖ΔW‖", _mean_curves(of, lambda run: [(step, size) for step, size, _ in run.get("norms") or ()])),
        ("mean amplification", _mean_curves(of, lambda run: [(step, by) for step, _, by in run.get("norms") or ()])),
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
    return Picture(results[0].task, "norms", "How updates grow", caption, chart)


def spectra(results: Sequence[Result]) -> Picture | None:
    """Singular values of updates and of FLoRA's cores, over the largest."""
    of, at = _at_main_budget(results)

    def found(kind: str, places: Callable[[int, int], float]) -> Curves:
        def points(run: Row) -> list[tuple[float, float]]:
            values = (run.get("spectra") or {}).get(kind) or ()
            return [(places(n, len(values)), value) for n, value in enumerate(values)]

        return _mean_curves(of, points)

    panels = [
        ("update", "singular value number", found("delta", lambda n, _: n + 1)),
        ("core", "share of the ranks", found("core", lambda n, count: n / max(1, count - 1))),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    chart, *axes_of = canvas(panels=len(panels), height=3.0 * len(panels))
    for axes, (what, place, lines) in zip(axes_of, panels, strict=True):
        draw(axes, lines, log=True, floor=1e-4)
        axes.set(xlabel=place, ylabel=f"{what}: value / largest")
    caption = (
        "Singular values over the largest, means over weights, modes and seeds. Update: along its two longest modes. "
        f"Core: along every mode, from the first rank to the last. {at[0].upper() + at[1:]}; below 0.0001 not shown."
    )
    return Picture(results[0].task, "spectra", "Spectra", caption, chart)


def radar(results: Sequence[Result]) -> Picture | None:
    """Normalised gain over three or more tasks that compare methods (paper, Fig. 2)."""
    tasks = {task: of for task, of in by_task(results).items() if len({result.method for result in of}) > 1}
    gains: dict[str, list[float]] = {}
    for of in tasks.values():
        of, _ = _at_main_budget(of)
        means = {result.method: result.mean for result in of}
        low, high = means.get("head", min(means.values())), means.get("full", max(means.values()))
        if high <= low:
            low, high = min(means.values()), max(means.values())
        for method, mean in means.items():
            gains.setdefault(method, []).append((mean - low) / (high - low) if high > low else 0.0)
    gains = {m: gains[m] for m in sorted(gains, key=order) if len(gains[m]) == len(tasks) and m not in ENDS}
    if len(tasks) < 3 or not gains:
        return None
    chart, axes = canvas(polar=True, height=5.2)
    angles = [2 * math.pi * n / len(tasks) for n in range(len(tasks) + 1)]
    for method, values in gains.items():
        axes.plot(angles, [*values, values[0]], **pen(method), label=label(method))
        if method == OURS:
            axes.fill(angles, [*values, values[0]], color=look(OURS)[0], alpha=0.12)
    every = [value for values in gains.values() for value in values]
    axes.set_ylim(min(0.0, *every) - 0.02, max(1.0, *every) * 1.05)
    axes.set_xticks(angles[:-1], [folded(task) for task in tasks])
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


def figure(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Learning curves of one run a method, with their trainable parameters: what `flora train` leaves."""
    chart, axes = canvas(width=7.5, height=4.2)
    lines = {row["method"]: row["curve"] for row in rows}
    sizes = {row["method"]: f"{row['adapter_parameters'] + row['head_parameters']:,}" for row in rows}
    draw(axes, lines, {method: f"{label(method)}  ({size})" for method, size in sizes.items()})
    axes.set(xlabel="epoch", ylabel=f"validation {metric}")
    axes.set_title("Adapting the base model to its new domain (trainable parameters)", loc="left", fontsize="medium")
    chart.savefig(path, dpi=160, format="png")


# ----------------------------------------------------------------------------------------------- what is drawn


def _scale(result: Result) -> float | None:
    """The scale s that the method's options give as a number."""
    scale = (result.runs[0].get("options") or {}).get("scale")
    return scale if isinstance(scale, int | float) and scale > 0 else None


def _methods(results: Iterable[Result]) -> list[Result]:
    """Without the points of a scale sweep, which would hide the other methods."""
    return [result for result in results if _scale(result) is None]


def _by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: order(result.method)):
        found.setdefault(result.method, []).append(result)
    return found


def _at_main_budget(results: Sequence[Result]) -> tuple[list[Result], str]:
    """A task's results at the budget that most methods ran, the lowest of equals, with those that have no budget."""
    main = main_budget(result.budget for result in results)
    kept = [result for result in ordered(results) if result.budget in (None, main)]
    return kept, "methods without a budget" if main is None else f"at a budget of {main:,} parameters"


def _mean_curves(results: Iterable[Result], points: Callable[[Row], list[tuple[float, float]]]) -> Curves:
    """Means over seeds at each place that a run has, by method."""
    found: Curves = {}
    for result in sorted(results, key=lambda result: order(result.method)):
        at: dict[float, list[float]] = {}
        for run in result.runs:
            for place, value in points(run):
                if math.isfinite(value):
                    at.setdefault(place, []).append(value)
        if at:
            found[result.method] = [(place, statistics.fmean(at[place])) for place in sorted(at)]
    return found


def _spread(lines: Curves) -> float:
    last = [points[-1][1] for points in lines.values() if points[-1][1] > 0]
    return max(last) / min(last) if last else 1.0
