"""Checks of single rows of a COCO file: the fields of every part, and whether boxes and masks fit their image.

Checks that need several rows (an unknown category, a split without objects) are in ``coco``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from reprlib import repr as short
from typing import Any

SLACK = 1  # pixels that boxes and polygons may exceed their image by: annotation tools round
THIN = 0.01  # pixels: a narrower box may have no width in float32 after cutting and scaling

Accepted = tuple[str, Callable[[Any], bool]]  # in words, and as a test of a value, which may be None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # so not NaN


def _is_mask(value: Any) -> bool:
    if isinstance(value, dict):
        counts = value.get("counts")
        return isinstance(counts, str) or (isinstance(counts, list) and all(type(count) is int for count in counts))
    return isinstance(value, list) and value != [] and all(map(_is_polygon, value))


def _is_polygon(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0 and all(map(_is_number, value))


WHOLE: Accepted = ("a whole number", lambda x: type(x) is int)
SIDE: Accepted = ("a whole number from 1", lambda x: type(x) is int and x > 0)
NAME: Accepted = ("a whole number or text", lambda x: type(x) in (int, str))
TEXT: Accepted = ("text", lambda x: isinstance(x, str) and x != "")
ROWS: Accepted = ("a list of one or more", lambda x: isinstance(x, list) and x != [])
BOX: Accepted = (
    "left, top, width and height in pixels",
    lambda x: isinstance(x, list) and len(x) == 4 and all(map(_is_number, x)),
)
MASK: Accepted = ("polygons of three or more points, or run lengths", _is_mask)
AREA: Accepted = ("a number from 0, or none", lambda x: x is None or (_is_number(x) and x >= 0))
CROWD: Accepted = ("0 or 1", lambda x: x in (None, 0, 1))

PARTS: dict[str, dict[str, Accepted]] = {
    "images": {"id": NAME, "file_name": TEXT, "height": SIDE, "width": SIDE},
    "annotations": {
        "image_id": NAME, "category_id": WHOLE, "bbox": BOX, "segmentation": MASK, "area": AREA, "iscrowd": CROWD,
    },
    "categories": {"id": WHOLE, "name": TEXT},
}  # fmt: skip


def check_fields(file: str, content: Any) -> None:
    """Raise ValueError, naming ``file``, part, row and field, for a field that is not accepted."""
    _check(file, content, dict.fromkeys(PARTS, ROWS))
    for part, fields in PARTS.items():
        for row, entry in enumerate(content[part]):
            _check(f"{file}, {part}, row {row}", entry, fields)


def _check(where: str, entry: Any, fields: Mapping[str, Accepted]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {short(entry)}, expected an object with {', '.join(fields)}")
    for key, (words, accepts) in fields.items():
        if not accepts(entry.get(key)):
            given = f"{key}={short(entry[key])}, expected {words}" if key in entry else f"no {key!r}"
            raise ValueError(f"{where}: {given}")


# -------------------------------------------------------------------------------------------------- boxes and masks


def box_is_empty(where: str, box: list[float], height: int, width: int) -> bool:
    """Whether nothing is left of it when it is cut to its image. Raises ValueError if it is outside the image."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
        raise ValueError(f"{where}: bbox={short(box)} is outside its image of {width} × {height}")
    return min(right, width) - max(left, 0) < THIN or min(bottom, height) - max(top, 0) < THIN


def mask_is_empty(where: str, given: Any, height: int, width: int) -> bool:
    """Whether run lengths have no pixel; polygons are taken to have some. Raises ValueError if a mask does not fit its
    image: pycocotools would read memory outside its arrays, or crash."""
    if isinstance(given, list):
        numbers = ((x, side) for polygon in given for x, side in zip(polygon, cycle((width, height)), strict=False))
        if not all(-SLACK <= x <= side + SLACK for x, side in numbers):
            raise ValueError(f"{where}: segmentation={short(given)} is outside its image of {width} × {height}")
        return False
    if (size := given.get("size")) != [height, width]:
        raise ValueError(f"{where}: segmentation.size={short(size)}, expected its image's, {[height, width]}")
    counts = run_lengths(given["counts"]) if isinstance(given["counts"], str) else given["counts"]
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        problem = f"segmentation.counts={short(given['counts'])}, expected lengths"
        raise ValueError(f"{where}: {problem} that add up to {width} × {height} pixels")
    return not any(counts[1::2])


def run_lengths(text: str) -> list[int]:
    """The run lengths in pycocotools' compressed counts; [] if the text is not valid.

    Each letter has five bits of a number, lowest first, and a sixth that says whether more follow. From the fourth
    number on, each is the difference from the last but one. pycocotools itself does not notice a text that is cut off.
    """
    counts: list[int] = []
    number = bits = 0
    for letter in text:
        part = ord(letter) - 48
        if not 0 <= part < 64:
            return []
        number |= (part & 31) << bits
        bits += 5
        if not part & 32:
            signed = number - (1 << bits) if part & 16 else number
            counts.append(signed + counts[-2] if len(counts) > 2 else signed)
            number = bits = 0
    return [] if bits else counts
