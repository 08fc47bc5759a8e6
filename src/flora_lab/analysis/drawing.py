"""What every figure is made of: paper and ink, pens, names at the ends of lines, and the way out as PNG or SVG."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.analysis.style import OURS, label, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches: made for a phone, where a figure's text is then about as large as the page's
INK, GRID = "#1b1f24", "#8a8f96"  # the page replaces the ink by its own colour of text
LEGEND = {"ncols": 2, "frameon": False, "fontsize": 9, "labelcolor": INK}

Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Picture:
    task: str | None  # None where it is of several
    name: str
    title: str
    caption: str
    chart: Figure

    @property
    def file(self) -> str:
        """Name of its PNG: letters, digits, points and dashes."""
        return re.sub(r"[^\w.-]+", "-", f"{self.task or 'all'}-{self.name}") + ".png"

    def png(self, path: Path) -> None:
        self.chart.savefig(path, dpi=180, format="png", facecolor="white")

    def svg(self) -> str:
        """To stand in a page: text as text in the page's font and colour, no name that another figure has too."""
        from matplotlib import rc_context

        buffer = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.file}):
            self.chart.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", svg)
        salt = re.sub(r"\W+", "-", self.file)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", svg)
        return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{_plain(self.title)}"', 1)


def _plain(text: str) -> str:
    return re.sub(r'[<>&"]', " ", text)


def canvas(panels: int = 1, width: float = WIDTH, height: float = 3.6, polar: bool = False) -> Any:
    """A figure and its axes, one above the other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context({**colours, "font.size": 10}):
        chart = Figure(figsize=(width, height), layout="constrained")
        every = chart.subplots(panels, squeeze=False, subplot_kw={"projection": "polar"} if polar else None)[:, 0]
    for axes in every:
        axes.patch.set_alpha(0)
        axes.grid(axis="both" if polar else "y", color=GRID, alpha=0.3, linewidth=0.8)
        axes.set_axisbelow(True)
        if not polar:
            axes.spines[["top", "right"]].set_visible(False)
    return chart, *every


def size(method: str, size: float) -> float:
    return size * (1.25 if method == OURS else 1.0)


def pen(method: str) -> dict[str, Any]:
    colour, marker = look(method)
    ours = method == OURS
    return {
        "color": colour,
        "marker": marker,
        "markersize": size(method, 4),
        "linewidth": 2.4 if ours else 1.3,
        "linestyle": "--" if method.startswith(f"{OURS}-") else "-",
        "zorder": 4 if ours else 3,
    }


def draw(
    axes: Axes,
    lines: Curves,
    names: dict[str, str] | None = None,
    log: bool = False,
    floor: float = 0.0,
) -> None:
    """A line a method, named at its end. On a logarithmic axis what is not above ``floor`` is left out."""
    ends = {}
    for method, points in lines.items():
        kept = [(x, y) for x, y in points if y > floor or not log]
        if kept:
            marker = {} if len(kept) < 3 else {"marker": ""}
            axes.plot(*zip(*kept, strict=True), **pen(method) | marker)
            ends[method] = kept[-1]
    if log:
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if high / low < 15 else NullFormatter())
    name_ends(axes, ends, names)


def name_ends(axes: Axes, ends: dict[str, tuple[float, float]], names: dict[str, str] | None = None) -> None:
    """Each name right of the axes, with a thread to its line's end, moved up or down so that no two overlap. The axes'
    limits are then fixed."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    axes.set_xlim(axes.get_xlim())
    scale = axes.transScale + axes.transLimits
    at = {method: scale.transform(end) for method, end in ends.items()}
    gap = 0.17 / (axes.figure.get_figheight() / len(axes.figure.axes) - 0.7)  # a line of text, in axes' heights
    for method, place in zip(at, apart([y for _, y in at.values()], gap), strict=True):
        colour, weight = look(method)[0], "bold" if method == OURS else "normal"
        outside = {"color": colour, "transform": axes.transAxes, "clip_on": False}
        (x, y), text = at[method], (names or {}).get(method) or label(method)
        axes.plot([x, 1.045], [y, place], linewidth=0.6, alpha=0.6, **outside)
        axes.text(1.06, place, text, va="center", fontsize=9, fontweight=weight, **outside)


def apart(heights: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The heights, moved as little as it takes that no two are nearer than ``gap``, and inside ``low`` to ``high`` if
    there is room for all: labels that do not overlap."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    high = max(high, low + gap * (len(heights) - 1))
    for _ in range(200):
        for below, above in itertools.pairwise(order):
            overlap = max(0.0, gap - (placed[above] - placed[below]))
            placed[below] -= overlap / 2
            placed[above] += overlap / 2
        if order:
            placed[order[0]] = max(placed[order[0]], low)
            placed[order[-1]] = min(placed[order[-1]], high)
    return placed


def plain_ticks(axes: Axes) -> None:
    """1k, 30k, 2M on a logarithmic axis, few enough not to touch."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def folded(text: str) -> str:
    """A long name in two lines."""
    return "\n".join(textwrap.wrap(text.replace("_", " "), 16))
