"""DOTA's files: pictures and text files of oriented boxes, read, checked, and cut into tiles.

A line of a text file is ``x1 y1 x2 y2 x3 y3 x4 y4 class difficult``, in pixels, the corners in order around the object;
commas may stand between. Lines such as ``gsd:0.25`` are skipped. Objects are kept as quadrilaterals (n, 4, 2), which
DOTA's evaluation uses; the detector learns rectangles (n, 5): centre x and y, long side, short side, and the angle from
the x axis to the long side, in [-π/2, π/2), y pointing down ("le90").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple

from flora.files import local_path
from flora_lab.tasks.data.pictures import picture_files, size_of
from flora_lab.tasks.data.records import split_name
from flora_lab.tasks.data.texts import read_lines

if TYPE_CHECKING:
    import numpy as np

LABELS = "labelTxt"  # a folder's name, or its beginning: labelTxt-v1.0
LINE = "x1 y1 x2 y2 x3 y3 x4 y4 class difficult"


@dataclass
class AerialImage:
    """A picture and its objects, by index: corners in pixels, classes from 1, whether the evaluation ignores them."""

    file: str
    name: str
    width: int
    height: int
    quads: list[list[float]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # where the user finds them: file and line


class Tile(NamedTuple):
    """Part of a picture; its left upper corner in pixels."""

    place: int  # of the picture
    left: int
    top: int


@dataclass
class Source:
    """``splits``: the places in ``images`` of each; ``classes``: their names, the first is class 1."""

    images: list[AerialImage]
    splits: dict[str, range]
    classes: list[str]


def read(folder: Path, classes: Sequence[str], ignore: Sequence[str], drop_bad: bool) -> Source:
    """From SPLIT/images/NAME.png with SPLIT/labelTxt/NAME.txt, or without SPLIT, which is all train.

    ``classes``: default are those of all files, by name. ``ignore``: classes to leave out; ``drop_bad``: leave out
    objects without area, not convex, or with more than half of their width or height outside their picture. Raises
    ValueError naming file and line.
    """
    local_path(folder)  # raises, if there is none
    places = {split_name(path.name): path for path in sorted(folder.glob("*/")) if _labels(path)}
    if not places and _labels(folder):
        places = {"train": folder}
    if not places:
        raise ValueError(f"{folder}: expected images/ and {LABELS}/ in it, or in train/ and val/")
    found = {name: list(_read_split(place, ignore, drop_bad)) for name, place in places.items()}
    every = [pair for split in found.values() for pair in split]
    names = list(classes) or sorted({name for _, names in every for name in names})
    for image, of in every:
        for row, name in zip(image.rows, of, strict=True):
            if name not in names:
                raise ValueError(f"{row}: class {name!r}, expected one of {', '.join(names)}")
        image.classes = [1 + names.index(name) for name in of]
    starts = [0]
    for split in found.values():
        starts.append(starts[-1] + len(split))
    splits = {name: range(starts[n], starts[n + 1]) for n, name in enumerate(found)}
    return Source([image for image, _ in every], splits, names)


def _labels(folder: Path) -> Path | None:
    """The folder of text files in a split's folder; None if it has none. Raises ValueError if it has several."""
    found = [path for path in sorted(folder.glob(f"{LABELS}*")) if path.is_dir()]
    if len(found) > 1:
        raise ValueError(f"{folder}: expected one folder {LABELS}, there are {', '.join(path.name for path in found)}")
    return found[0] if found else None


def _read_split(folder: Path, ignore: Sequence[str], drop_bad: bool) -> Iterator[tuple[AerialImage, list[str]]]:
    """Each picture, still without its objects' classes, and the names of these."""
    labels = {path.stem: path for path in sorted(_labels(folder).glob("*.txt"))}
    pictures: dict[str, Path] = {}
    for path in picture_files(folder / "images", "*"):
        if (first := pictures.setdefault(path.stem, path)) is not path:
            raise ValueError(f"{first} and {path} have the same name")
    if not pictures:
        raise ValueError(f"{folder / 'images'}: there is no picture in it")
    for stem in sorted(labels.keys() ^ pictures.keys()):
        at = pictures.get(stem) or labels[stem]
        raise ValueError(f"{at}: there is no {'text file' if stem in pictures else 'picture'} of that name")
    for stem, file in pictures.items():
        width, height = size_of(str(file))
        image, names = AerialImage(str(file), str(file), width, height), []
        for where, line in read_lines(labels[stem]):
            if line.startswith(("imagesource:", "gsd:")):
                continue
            quad, name, difficult = _object(where, line)
            if name in ignore:
                continue
            if problem := _problem(quad, width, height):
                if drop_bad:
                    continue
                raise ValueError(f"{where}: {short(line)} {problem}; task.data.drop_bad=true leaves such objects out")
            image.quads.append(quad)
            image.difficult.append(difficult)
            image.rows.append(where)
            names.append(name)
        yield image, names


def _object(where: str, line: str) -> tuple[list[float], str, bool]:
    fields = [part.strip() for part in line.split(",")] if line.count(",") >= 8 else line.split()
    if len(fields) not in (9, 10):
        raise ValueError(f"{where}: {short(line)} has {len(fields)} fields, expected {LINE}")
    numbers = []
    for text in fields[:8]:
        try:
            numbers.append(float(text))
        except ValueError:
            raise ValueError(f"{where}: {text!r} is not a number, expected {LINE}") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}: {short(line)} has a corner that is not finite")
    difficult = fields[9] if len(fields) == 10 else "0"
    if not difficult.isdecimal():
        raise ValueError(f"{where}: difficult is {difficult!r}, expected 0 for an object that counts, or 1")
    return numbers, fields[8], difficult != "0"


def _problem(quad: list[float], width: int, height: int) -> str | None:
    """What is wrong with an object's corners, in words."""
    for numbers, size in ((quad[::2], width), (quad[1::2], height)):
        low, high = min(numbers), max(numbers)
        if min(high, size) - max(low, 0) < (high - low) / 2:
            return f"has more than half of its width or height outside the image of {width} × {height}"
    corners, turns = list(zip(quad[::2], quad[1::2], strict=True)), []
    for n in range(4):
        (ax, ay), (bx, by), (cx, cy) = (corners[(n + step) % 4] for step in range(3))
        turns.append((bx - ax) * (cy - by) - (by - ay) * (cx - bx))
    if min(turns) < 0 < max(turns):
        return "is not convex: its corners are not in order around it"
    return "has an area below one pixel" if abs(sum(turns)) < 4 else None  # four times the area


# ------------------------------------------------------------------------------------------------------------ geometry


def tiles_of(place: int, image: AerialImage, side: int, overlap: int) -> list[Tile]:
    """Squares of ``side`` that cover a picture and overlap by ``overlap`` pixels or, at the end, more."""

    def starts(length: int) -> list[int]:
        return [*range(0, max(0, length - side), side - overlap), max(0, length - side)]

    return [Tile(place, left, top) for top in starts(image.height) for left in starts(image.width)]


def shares(quads: np.ndarray, side: int) -> np.ndarray:
    """The share of the area of each quadrilateral (n, 4, 2) that lies in a tile; relative to the tile's corner."""
    import shapely

    whole = shapely.polygons(quads)
    return shapely.area(shapely.intersection(whole, shapely.box(0, 0, side, side))) / shapely.area(whole)


def rectangles(quads: np.ndarray) -> np.ndarray:
    """The smallest rectangles (n, 5) around convex quadrilaterals (n, 4, 2): one side lies on a side of theirs."""
    import numpy as np

    quads = np.asarray(quads, dtype="float64").reshape(-1, 4, 2)
    edges = np.roll(quads, -1, 1) - quads
    angles = np.arctan2(edges[..., 1], edges[..., 0])  # (n, 4)
    along = np.stack([np.cos(angles), np.sin(angles)], -1)
    across = np.stack([-np.sin(angles), np.cos(angles)], -1)
    u, v = (np.einsum("nec,nkc->nek", axes, quads) for axes in (along, across))  # of each corner k, by edge e
    long, short_ = u.max(-1) - u.min(-1), v.max(-1) - v.min(-1)
    length = np.hypot(edges[..., 0], edges[..., 1])
    best = np.where(length > 0, long * short_, np.inf).argmin(-1)

    def pick(values: Any) -> Any:
        return values[np.arange(len(quads)), best]

    middle_u, middle_v = (pick((x.max(-1) + x.min(-1)) / 2)[:, None] for x in (u, v))
    centre = middle_u * pick(along) + middle_v * pick(across)
    width, height, angle = pick(long), pick(short_), pick(angles)
    angle = np.where(width < height, angle + np.pi / 2, angle)
    angle = (angle + np.pi / 2) % np.pi - np.pi / 2
    sides = np.stack([np.maximum(width, height), np.minimum(width, height)], -1)
    return np.concatenate([centre, sides, angle[:, None]], -1)


def corners(boxes: np.ndarray) -> np.ndarray:
    """The corners (n, 4, 2) of rectangles (n, 5)."""
    import numpy as np

    x, y, width, height, angle = np.asarray(boxes, dtype="float64").reshape(-1, 5).T
    along = np.stack([np.cos(angle), np.sin(angle)], -1) * width[:, None] / 2
    across = np.stack([-np.sin(angle), np.cos(angle)], -1) * height[:, None] / 2
    centre = np.stack([x, y], -1)
    return np.stack(
        [centre - along - across, centre + along - across, centre + along + across, centre - along + across], 1
    )
