"""What all figures share: canvas, pens, names at the ends of lines, and output as PNG or SVG. No torch."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.analysis.style import GRID, INK, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flora_lab.analysis.results import Result

WIDTH = 4.6  # inches: on a phone a figure's text is then about as large as the page's
LINE = 0.17  # inches from a line of text to the next
LEGEND = {"ncols": 2, "frameon": False, "fontsize": 9, "labelcolor": INK}

Curves = dict[Style, list[tuple[float, float]]]  # of each variant, points (x, y)


@dataclass(frozen=True)
class Picture:
    job: str | None  # None if it shows several
    name: str
    title: str
    caption: str
    chart: Figure
    at: str = ""  # the budget of what it shows, in words
    colours: int | None = 256  # of its PNG, the most frequent, which makes it a third of the size; None: all

    @property
    def file(self) -> str:
        """Name of its PNG: letters, digits, dots and dashes."""
        return re.sub(r"[^\w.-]+", "-", f"{self.job or 'all'}-{self.name}") + ".png"

    @property
    def heading(self) -> str:
        """What a PNG says on its own: the job, the title, and at what budget if it shows one of several."""
        parts = [self.job, self.title.lower() if self.job else self.title]
        return ", ".join(filter(None, [": ".join(filter(None, parts)), self.at]))

    def png(self, path: Path) -> None:
        from PIL import Image

        title = self.chart.suptitle(self.heading, fontsize=9, x=0.01, ha="left", wrap=True)
        self.chart.savefig(buffer := io.BytesIO(), dpi=180, format="png", facecolor="white")
        title.set_text("")  # the page has its own
        drawn = Image.open(buffer).convert("RGB")
        if self.colours:  # Pillow's own choice would change a line's colour
            counts = sorted(drawn.getcolors(drawn.width * drawn.height), reverse=True)
            palette = Image.new("P", (1, 1))
            palette.putpalette([value for _, colour in counts[: self.colours] for value in colour])
            drawn = drawn.quantize(palette=palette, dither=Image.Dither.NONE)
        drawn.save(path, "PNG", optimize=True)

    def svg(self) -> str:
        """For the page: text stays text, in the page's font and colour; no id occurs in another figure too."""
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


def canvas(panels: int = 1, width: float = WIDTH, height: float = 3.6, polar: bool = False, grid: str = "y") -> Any:
    """A figure and its axes, one above the other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context({**colours, "font.size": 10}):
        chart = Figure(figsize=(width, height), layout="constrained")
        every = chart.subplots(panels, squeeze=False, subplot_kw={"projection": "polar"} if polar else None)[:, 0]
    for axes in every:
        axes.patch.set_alpha(0)
        axes.grid(axis="both" if polar else grid, color=GRID, alpha=0.3, linewidth=0.8)
        axes.set_axisbelow(True)
        if not polar:
            axes.spines[["top", "right"]].set_visible(False)
    return chart, *every


def pen(style: Style, size: float = 4) -> dict[str, Any]:
    """matplotlib's keywords for a variant's line and markers: FLoRA's are large and in front."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": size * (1.25 if style.ours else 1.0),
        "linewidth": 2.4 if style.ours else 1.3,
        "linestyle": style.dashes,
        "zorder": 4 if style.ours else 3,
    }


def draw(axes: Axes, lines: Curves, names: dict[Style, str] | None = None, log: bool = False) -> None:
    """One line per variant, named at its end. A logarithmic axis shows four decades at most, and nothing up to 0."""
    top = max((y for points in lines.values() for _, y in points), default=0.0)
    ends = {}
    for style, points in lines.items():
        kept = [(x, y) for x, y in points if y > 1e-4 * top or not log]
        if kept:
            marker = {} if len(kept) < 3 else {"marker": ""}
            axes.plot(*zip(*kept, strict=True), **pen(style) | marker)
            ends[style] = kept[-1]
    if log:
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if high / low < 15 else NullFormatter())
    name_ends(axes, ends, names)


def mean_bars(
    axes: Axes,
    lines: dict[Style, list[tuple[float, Result]]],
    levels: list[tuple[Style, Result]],
    ticks: Iterable[float],
    times: int,
) -> None:
    """Results (x, result) as lines of means with bars of standard deviations, on a logarithmic axis; levels, which have
    no x, as horizontal lines. Means are multiplied by ``times``."""
    axes.set_xscale("log")
    ends = {}
    for style, of in lines.items():
        places, means = [x for x, _ in of], [times * result.mean for _, result in of]
        spread = [times * (result.std or 0) for _, result in of]
        axes.errorbar(places, means, yerr=spread, **pen(style), elinewidth=0.8, capsize=2)
        ends[style] = places[-1], means[-1]
    ticks_at(axes, ticks)
    for style, result in levels:
        axes.axhline(times * result.mean, color=style.colour, linestyle=style.dashes, linewidth=1.2)
        ends[style] = axes.get_xlim()[1], times * result.mean
    name_ends(axes, ends)


def dots(axes: Axes, lines: Sequence[Style | str]) -> None:
    """Name what was drawn at the heights 0, 1, … from the top: variants beside the axis, titles (text) in it."""
    axes.figure.set_figheight(0.75 + 0.215 * len(lines) + 0.2)
    kept = [(place, style) for place, style in enumerate(lines) if not isinstance(style, str)]
    axes.set_yticks([place for place, _ in kept], [style.label for _, style in kept])
    for tick, (_, style) in zip(axes.get_yticklabels(), kept, strict=True):
        tick.set_fontweight("bold" if style.ours else "normal")
    for place, title in enumerate(lines):
        if isinstance(title, str):
            name = {"va": "center", "color": INK, "fontsize": 9, "fontstyle": "italic"}
            axes.text(0.01, place, title, transform=axes.get_yaxis_transform(), **name)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.3, -0.7)


def name_ends(axes: Axes, ends: dict[Style, tuple[float, float]], names: dict[Style, str] | None = None) -> None:
    """Write each name to the right of the axes, with a thin line to its curve's end, moved up or down so that no two
    overlap. Makes the figure taller where many names need it, and fixes the limits of the axes."""
    figure, panels = axes.figure, len(axes.figure.axes)
    figure.set_figheight(max(figure.get_figheight(), panels * (0.7 + LINE * len(ends))))
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    axes.set_xlim(axes.get_xlim())
    scale = axes.transScale + axes.transLimits
    at = {style: scale.transform(end) for style, end in ends.items()}
    gap = LINE / (figure.get_figheight() / panels - 0.7)  # a line of text, in axes' heights
    for style, place in zip(at, apart([y for _, y in at.values()], gap), strict=True):
        weight = "bold" if style.ours else "normal"
        outside = {"color": style.colour, "transform": axes.transAxes, "clip_on": False}
        (x, y), text = at[style], (names or {}).get(style) or style.label
        axes.plot([x, 1.045], [y, place], linewidth=0.6, alpha=0.6, **outside)
        axes.text(1.06, place, text, va="center", fontsize=9, fontweight=weight, **outside)


def apart(heights: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The heights, moved so that no two are closer than ``gap``, and within ``low`` to ``high`` if all have room."""
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


def ticks_at(axes: Axes, values: Iterable[float]) -> None:
    """Ticks of a logarithmic axis at the values that were tried, without those too near another: 0.04, 20k, 2M."""
    from matplotlib.ticker import EngFormatter, NullLocator

    low, high = map(math.log10, axes.get_xlim())
    kept: list[float] = []
    for value in sorted(values):
        if not kept or math.log10(value / kept[-1]) > 0.14 * (high - low):
            kept.append(value)
    large = EngFormatter(sep="")
    texts = [large(float(f"{value:.3g}")) if value >= 1000 else f"{value:g}" for value in kept]
    axes.set_xticks(kept, texts)
    axes.xaxis.set_minor_locator(NullLocator())


def folded(text: str) -> str:
    """A long name, broken into lines."""
    return "\n".join(textwrap.wrap(text.replace("_", " "), 16))
