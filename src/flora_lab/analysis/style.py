"""How a method is called and drawn, the same wherever it stands. No torch, no matplotlib.

Colours are dark enough for text on white (the page brightens them on dark), and markers differ where colours are near.
"""

from __future__ import annotations

import zlib

from flora_lab.methods import METHODS

OURS = "flora"
VARIANTS = {"core": "core start", "factor": "factor start", "gradient": "gradient start", "official": "official start"}
LOOKS = {  # colour, marker
    "full": ("#737373", "s"),
    "head": ("#7f7f7f", "v"),
    "bitfit": ("#8d6e63", "<"),
    "houlsby": ("#a14bb5", "h"),
    "pfeiffer": ("#b9528f", "H"),
    "lora": ("#0072b2", "o"),
    "dora": ("#2f86bf", "D"),
    "adalora": ("#5b6bd6", "p"),
    "loha": ("#00875f", "^"),
    "lokr": ("#5f7f1c", "P"),
    "locon": ("#946e00", "X"),
    "flora": ("#d55e00", "o"),
    "flora-core": ("#c0392b", "d"),
    "flora-factor": ("#b5673a", "8"),
    "flora-gradient": ("#d04a5b", ">"),
    "flora-official": ("#a8574f", "*"),
}
OTHERS = [("#7a6a9b", "d"), ("#4f8f8f", ">"), ("#9b7a5a", "*"), ("#5f7fae", "8"), ("#8a8a3a", "<")]


def label(method: str) -> str:
    """For a reader: "flora" -> "FLoRA", "flora-core" -> "FLoRA, core start", "lora-r8" -> "LoRA, r8"; a name that
    starts with no method's as it is."""
    way, _, variant = method.partition("-")
    if way not in METHODS:
        return method
    return METHODS[way].label + (f", {VARIANTS.get(variant, variant.replace('-', ' '))}" if variant else "")


def look(method: str) -> tuple[str, str]:
    """Colour and marker; a method that is not in the table gets the same ones every time."""
    return LOOKS.get(method) or OTHERS[zlib.crc32(method.encode()) % len(OTHERS)]


def order(method: str) -> tuple[int, float, str]:
    """To sort by: as the registry has it, variants after their method, by number where they have one, others last."""
    ways = list(METHODS)
    way, _, variant = method.partition("-")
    number = float(variant) if variant.replace(".", "", 1).isdecimal() else -1.0
    return (ways.index(way) if way in METHODS else len(ways), number, method)
