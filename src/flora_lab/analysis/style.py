"""How a variant is named and drawn, the same in every table and figure. No matplotlib.

A label is made of the method and the options of a variant; the name that the user gave the variant is shown only
where two variants would have one label. Colours are dark enough for text on white (the page brightens them on dark),
and markers differ where colours are close.
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
COLOURS = {  # colour and marker of a method, or of a method and its start
    "full": ("#737373", "s"),
    "head": ("#7f7f7f", "v"),
    "bitfit": ("#8d6e63", "<"),
    "houlsby": ("#a14bb5", "h"),
    "pfeiffer": ("#b9528f", "H"),
    "lora": ("#0072b2", "o"),
    "dora": ("#2f86bf", "D"),
    "rslora": ("#2a6f97", "v"),
    "loraplus": ("#1a6fae", "s"),
    "pissa": ("#3a7ca5", "^"),
    "olora": ("#4a78c2", "<"),
    "orthogonal": ("#3f7896", ">"),
    "eva": ("#4a6bb8", "P"),
    "lora_ga": ("#6a60c8", "X"),
    "adalora": ("#5b6bd6", "p"),
    "loha": ("#00875f", "^"),
    "lokr": ("#5f7f1c", "P"),
    "hira": ("#2e7d4f", "D"),
    "gralora": ("#3f7d6b", "p"),
    "miss": ("#6b7a12", "h"),
    "oft": ("#7a6f2b", "H"),
    "locon": ("#946e00", "X"),
    "flora": ("#d55e00", "o"),
    "flora-core": ("#c0392b", "d"),
    "flora-factor": ("#b5673a", "8"),
    "flora-activations": ("#b8457a", "p"),
    "flora-gradient": ("#d04a5b", ">"),
    "flora-official": ("#a8574f", "*"),
}
OTHERS = [("#7a6a9b", "d"), ("#4f8f8f", ">"), ("#9b7a5a", "*"), ("#5f7fae", "8"), ("#8a8a3a", "<")]


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
    colour, marker = COLOURS.get(key) or OTHERS[zlib.crc32(text.encode()) % len(OTHERS)]
    place = list(METHODS).index(method) if method in METHODS else len(METHODS)
    number = next((float(value) for value in options.values() if isinstance(value, int | float)), -1.0)
    return Style(variant, method, text, colour, marker, plain, (place, number, text))


FLORA = _style(OURS, OURS, {}, label(OURS, {}), plain=True)
