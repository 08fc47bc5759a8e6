"""The figure of a truncation, from its report: no torch."""

from __future__ import annotations

from pathlib import Path

from flora.convert.report import TruncationReport

ROLES = {"out": "output modes", "in": "input modes", "kernel": "kernel modes", "other": "modes of raw parameters"}
LINE, DOT = "#0072b2", "#d55e00"
LOWEST = 1e-5  # not far below, singular values computed from Gram matrices are rounding


def plot_spectra(report: TruncationReport, path: Path) -> None:
    """Draw the singular values of every mode's unfolding, divided by the largest one, over the rank.

    There is one panel per role, one faint line per weight, and a dot at the rank that the weight got.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    # modes of length 1 and updates of zero have nothing to show
    modes = [
        (role, [value / values[0] for value in values], row.ranks and row.ranks[n])
        for row in report.rows
        for n, (role, values) in enumerate(zip(row.roles, row.spectra, strict=True))
        if len(values) > 1 and values[0] > 0
    ]
    panels = [(title, [mode[1:] for mode in modes if mode[0] == role]) for role, title in ROLES.items()]
    panels = [(title, lines) for title, lines in panels if lines]
    chart = Figure(figsize=(0.8 + 3.4 * max(2, len(panels)), 3.9), layout="constrained")
    for n, (title, lines) in enumerate(panels):
        axes = chart.add_subplot(1, len(panels), n + 1, sharey=chart.axes[0] if n else None)
        for values, rank in lines:
            ranks = range(1, len(values) + 1)
            axes.plot(ranks, values, color=LINE, linewidth=0.9, alpha=max(0.12, len(lines) ** -0.5), zorder=2)
            if rank:
                axes.plot(rank, max(values[rank - 1], LOWEST), ".", color=DOT, markersize=7, alpha=0.7, zorder=3)
        axes.set(xlabel="rank", yscale="log")
        if max(len(values) for values, _ in lines) > 16:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{title} ({len(lines)})", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.tick_params(which="both", labelleft=n == 0)
    if panels:
        first = chart.axes[0]
        first.set(ylabel="singular value / largest")
        bottom = max(LOWEST, first.get_ylim()[0])
        first.set_ylim(bottom=bottom)
        first.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        first.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if bottom > 0.1 else NullFormatter())
        dot = Line2D([], [], color=DOT, marker=".", markersize=7, linestyle="none", label="rank chosen")
        first.legend(handles=[Line2D([], [], color=LINE, label="one weight"), dot], loc="lower left", frameon=False)
    weights = f"{sum(row.ranks is not None for row in report.rows)} of {len(report.rows)} weights"
    title = f"{weights}, {report.parameters:,} parameters, {report.energy:.1%} of the energy kept"
    chart.suptitle(title, x=0.01, ha="left", fontsize="medium")
    chart.savefig(path, dpi=160, format="png")
