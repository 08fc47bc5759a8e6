"""How a variant is named and drawn, the same in every table and figure. No matplotlib.

A label is made of the method and the options of a variant; the name that the user gave the variant is shown only
where two variants would have one label. `PALETTE` has every colour: dark enough for text on white (the page brightens
them on dark). Methods that are often drawn together differ in colour (ΔE of 29, and of 15 to readers who see no red and
green apart), the others at least in marker and dashes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flora_lab.analysis.fields import Row
from flora_lab.methods import METHODS

OURS = "flora"
STARTS = ("core", "factor", "activations", "gradient", "official")  # values of FLoRA's option `init`
INK, GRID = "#1b1f24", "#8a8f96"  # the page replaces the ink by its own text colour
PALETTE = {  # colour, marker and dashes of a method, or of a method and its start
    "full": (INK, "s", "--"),
    "head": (GRID, "v", "--"),
    "bitfit": ("#9610fa", "<", "-"),
    "houlsby": ("#b97aba", "h", "-"),
    "pfeiffer": ("#f71df9", "H", "-."),
    "lora": ("#0072b2", "o", "-"),
    "dora": ("#7b61e0", "D", "--"),
    "adalora": ("#0c7177", "p", "-."),
    "rslora": ("#0072b2", "v", ":"),
    "loraplus": ("#0072b2", "s", "-."),
    "pissa": ("#3a7ca5", "^", "--"),
    "olora": ("#3a7ca5", "<", ":"),
    "orthogonal": ("#3a7ca5", ">", "-."),
    "eva": ("#7b61e0", "P", "-."),
    "lora_ga": ("#7b61e0", "X", ":"),
    "corda": ("#7b61e0", "d", "--"),
    "loha": ("#017a4f", "^", "-"),
    "lokr": ("#3b7603", "P", "-."),
    "hira": ("#017a4f", "D", ":"),
    "gralora": ("#017a4f", "p", "--"),
    "miss": ("#3b7603", "h", ":"),
    "oft": ("#3b7603", "H", "--"),
    "locon": ("#998f34", "X", "--"),
    "flora": ("#d55e00", "o", "-"),
    "flora-core": ("#b93243", "d", ":"),
    "flora-factor": ("#b5673a", "8", ":"),
    "flora-activations": ("#ad33a2", "p", "--"),
    "flora-gradient": ("#fa2f81", ">", "-."),
    "flora-official": ("#c47f5e", "*", "--"),
}
OTHERS = [("#7a6a9b", "d"), ("#4f8f8f", ">"), ("#9b7a5a", "*"), ("#5f7fae", "8"), ("#8a8a3a", "<")]  # dash-dotted


@dataclass(frozen=True)
class Style:
    """How one variant is named and drawn.

    ``plain``: it stands for its method: it bears the method's name or, if no variant does, has no options. ``order``:
    sorts variants by their method's place in the registry, then by the first number in their options.
    """

    variant: str
    method: str
    label: str
    colour: str
    marker: str
    dashes: str
    plain: bool
    order: tuple[int, float, str]

    @property
    def ours(self) -> bool:
        """Whether this is plain FLoRA, which the others are compared with."""
        return self.plain and self.method == OURS


def styles(rows: Iterable[Row]) -> dict[tuple[str, str], Style]:
    """The style of every (job, variant) in the rows."""
    subjects = {(row["job"], row["variant"]): (row["method"], row.get("options") or {}) for row in rows}
    variants: dict[str, set[str]] = {}  # by label
    for (_, variant), subject in subjects.items():
        variants.setdefault(label(*subject), set()).add(variant)
    made = {}
    for (job, variant), (method, options) in subjects.items():
        text = label(method, options)
        if len(variants[text]) > 1 and variant != method:
            text = f"{text} ({variant})"
        namesake = subjects.get((job, method), (None, {}))[0]  # the method of the variant that bears the method's name
        plain = variant == method or (not options and namesake != method)
        made[job, variant] = _style(variant, method, options, text, plain)
    return made


def label(method: str, options: Mapping[str, Any]) -> str:
    """For a reader: "FLoRA", "FLoRA, core start", "LoRA, r=8"; an unknown method as it is."""
    if method not in METHODS:
        return method
    parts = [
        f"{value} start" if key == "init" and value in STARTS else f"{key}={value}"
        for key, value in options.items()
        if isinstance(value, str | int | float)
    ]
    return ", ".join([METHODS[method].label, *parts])


def _style(variant: str, method: str, options: Mapping[str, Any], text: str, plain: bool) -> Style:
    key = f"{method}-{options['init']}" if options.keys() == {"init"} else method if plain else None
    pen = PALETTE.get(key) or (*OTHERS[zlib.crc32(text.encode()) % len(OTHERS)], "-.")
    place = list(METHODS).index(method) if method in METHODS else len(METHODS)
    number = next((float(value) for value in options.values() if isinstance(value, int | float)), -1.0)
    return Style(variant, method, text, *pen, plain, (place, number, text))


FLORA = _style(OURS, OURS, {}, label(OURS, {}), plain=True)
