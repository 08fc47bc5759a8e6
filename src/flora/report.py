"""What a person reads after a run: a table, and a figure of learning curves. From plain rows, no torch."""

import itertools
from pathlib import Path

LABELS = {"full": "full fine-tuning", "head": "head only", "lora": "LoRA", "flora": "FLoRA"}
COLOURS = {"full": "#4d4d4d", "head": "#a6a6a6", "lora": "#0072b2", "flora": "#d55e00"}


def table(rows: list[dict]) -> str:
    """Markdown, aligned: the same text reads well in a terminal and in a README."""
    lines = [["method", "test accuracy", "trainable: adapter + head", "seconds", "on disk"]]
    for row in rows:
        lines.append(
            [
                LABELS[row["method"]],
                f"{100 * row['test']:.1f} %",
                f"{row['adapter_parameters']:,} + {row['head_parameters']:,}",
                f"{row['seconds']:.0f}",
                f"{row['bytes'] / 1024:,.0f} KiB",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return "\n".join(
        "| " + " | ".join(place(cell, width) for place, cell, width in zip(align, line, widths, strict=True)) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def summary(rows: list[dict]) -> str:
    """The table, and below it what each method says of itself."""
    lines = [table(rows), ""]
    for row in rows:
        lines += [f"{LABELS[row['method']]}: {note}" for note in row["notes"]]
        if "loaded_difference" in row:
            lines.append(
                f"{LABELS[row['method']]}: largest difference of an output, loaded from disk against trained "
                f"{row['loaded_difference']:.1e}, merged against loaded {row['merged_difference']:.1e}"
            )
    return "\n".join(lines).rstrip()


def figure(rows: list[dict], metric: str, path: Path) -> None:
    """Validation metric by epoch, a line a method, its name and trainable parameters at the line's end."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = chart.subplots()
    ends = {}
    for row in rows:
        epochs, values = zip(*row["curve"], strict=True)
        axes.plot(epochs, values, color=COLOURS[row["method"]], linewidth=1.6, marker="." if len(epochs) < 3 else None)
        ends[row["method"]] = values[-1]
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    for row, height in zip(rows, _apart(list(ends.values()), gap=0.05 * (high - low)), strict=True):
        trainable = row["adapter_parameters"] + row["head_parameters"]
        label = f"{LABELS[row['method']]}  ({trainable:,})"
        axes.annotate(label, (right, height), color=COLOURS[row["method"]], va="center", annotation_clip=False)
    axes.set(xlabel="epoch", ylabel=f"validation {metric}")
    axes.set_title("Adapting the base model to its new domain (trainable parameters)", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    chart.savefig(path, dpi=160, format="png")


def _apart(heights: list[float], gap: float) -> list[float]:
    """The heights, moved as little as it takes that no two are nearer than `gap`: labels that do not overlap."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for _ in range(100):  # every pass halves what still overlaps
        for below, above in itertools.pairwise(order):
            overlap = max(0.0, gap - (placed[above] - placed[below]))
            placed[below] -= overlap / 2
            placed[above] += overlap / 2
    return placed
