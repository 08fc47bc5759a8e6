"""A figure of pictures, prompts across, methods down: generated ones, or given ones with what was found. No torch."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from flora_lab.analysis.drawing import Picture, canvas
from flora_lab.analysis.results import Result, at_main_budget
from flora_lab.analysis.style import INK

ACROSS = 12  # pictures at most
SIDE, LARGE = 0.6, 2.4  # inches: of a generated picture, and of a given one
LEFT, ABOVE = 1.6, 0.3  # inches for names


def grid(results: Sequence[Result]) -> Picture | None:
    """What each variant, and the base model, makes of the same prompts and seeds: the first seed's trials at the main
    budget."""
    kept, at = at_main_budget(results)
    kept = [result for result in kept if result.rows[0].get("samples")]
    if not kept:
        return None
    samples = kept[0].rows[0]["samples"]
    given = samples.get("reference")  # what the first line shows, if not the base model's pictures
    lines = [(given or "base model", samples["base"])]
    lines += [(result.label, result.rows[0]["samples"]["images"]) for result in kept]
    columns = _columns(samples["prompts"])
    side = LARGE if given else SIDE
    left, above = LEFT / side, ABOVE / side
    chart, axes = canvas(width=side * (left + len(columns)), height=side * (above + len(lines)))
    for row, (label, images) in enumerate(lines):
        for place, column in enumerate(columns):
            if column < len(images):
                extent = (place, place + 0.96, row + 0.96, row)
                axes.imshow(_decoded(images[column]), extent=extent, origin="upper", interpolation="none")
        bold = "bold" if row and kept[row - 1].style.ours else "normal"
        name = "\n".join(textwrap.wrap(label, 20))
        axes.text(-0.06 / side, row + 0.48, name, ha="right", va="center", color=INK, fontweight=bold)
    for place, column in enumerate(columns):
        prompt, before = samples["prompts"][column], samples["prompts"][columns[place - 1]] if place else None
        if prompt != before:
            axes.text(place, -0.07 / side, textwrap.shorten(prompt, 40), ha="left", va="bottom", color=INK, fontsize=9)
    axes.set(xlim=(-left, len(columns)), ylim=(len(lines), -above), aspect="equal")
    axes.set_axis_off()
    chart.suppressComposite = True  # in SVG each picture keeps its own pixels
    same = "pictures" if given else "prompts and starting noise"
    caption = f"The same {same} for all; {at}, at each method's chosen learning rate, with its first seed."
    return Picture(results[0].job, "pictures", "Pictures", caption, chart, colours=None)


def _columns(prompts: Sequence[str]) -> list[int]:
    """Which pictures are shown: of each prompt about as many, at most `ACROSS` in all."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    each = max(1, ACROSS // len(places))
    return [place for some in places.values() for place in some[:each]][: max(ACROSS, len(places))]


def _decoded(image: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(image)))
