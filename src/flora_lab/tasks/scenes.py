"""Scenes: pictures, each with a picture of labels for its pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora_lab.tasks.data import Table, split_name
from flora_lab.tasks.pictures import Pictures, open_image

IGNORED = 255  # the label that transformers' segmentation losses leave out


@dataclass
class Scenes(Pictures):
    """Which pictures there are, with a picture of labels each, and how they are shown."""

    path: str = field(
        default="data",
        metadata={
            "help": "parquet, a hub name, or a folder with images/ and annotations/ of equal stems",
            "path": True,
        },
    )
    image: str = field(default="image", metadata={"help": "column of the pictures"})
    annotation: str = field(default="annotation", metadata={"help": "column of their labels, a picture of one channel"})
    classes: int | None = field(default=None, metadata={"help": "how many; without it the largest label tells"})
    ignore: list[int] = field(default_factory=list, metadata={"help": f"labels not counted, beside {IGNORED}"})
    reduce_labels: bool = field(default=False, metadata={"help": "label 0 is not counted, and 1 is the first class"})
    size: list[int] = field(
        default_factory=list, metadata={"help": "height and width that a picture is scaled to fit, and padded to"}
    )
    crop: list[int] = field(default_factory=list, metadata={"help": "height and width of train's crops, if not size"})
    augment: bool = field(
        default=False, metadata={"help": "show train's at half to twice that scale, cropped at random, and mirrored"}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("size", "crop"):
            given = getattr(self, name)
            if given and (len(given) != 2 or min(given) < 1):
                raise ValueError(f"task.data.{name}={given}: expected a height and a width")
        if self.crop and not self.augment:
            raise ValueError(f"task.data.crop={self.crop}: crops are made with task.data.augment=true only")
        if self.classes is not None and not 2 <= self.classes <= IGNORED:
            raise ValueError(f"task.data.classes={self.classes}: expected 2 to {IGNORED}")
        if strange := [label for label in self.ignore if not 0 <= label <= IGNORED]:
            raise ValueError(f"task.data.ignore={self.ignore}: {strange[0]} is no label, expected 0 to {IGNORED}")


def labels_of(table: Table, index: int, keys: Scenes) -> Any:
    """A row's labels, a numpy array of bytes (height, width): classes from 0, and IGNORED."""
    import numpy as np

    picture = open_image(table, index, keys.annotation)
    raw = np.array(picture)
    if raw.ndim != 2 or raw.dtype.kind not in "biu":
        raise ValueError(
            f"{table.name(index)}: {keys.annotation!r} is of mode {picture.mode}, expected one channel of whole numbers"
        )
    if len(strange := raw[(raw < 0) | (raw > IGNORED)]):
        raise ValueError(f"{table.name(index)}: {keys.annotation!r} has label {strange[0]}, expected 0 to {IGNORED}")
    ours = np.arange(IGNORED + 1)
    ours[[*keys.ignore, IGNORED]] = IGNORED
    if keys.reduce_labels:
        ours = np.where((ours == 0) | (ours == IGNORED), IGNORED, ours - 1)
    return ours.astype("uint8")[raw.astype("uint8")]


def read_pairs(folder: Path, keys: Scenes) -> dict[str, Table]:
    """Of images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png; without the SPLIT all are train."""
    import datasets

    found: dict[str, dict[Path, Path]] = {}
    for kind in ("images", "annotations"):
        files = sorted(path for path in (folder / kind).rglob("*") if path.is_file() and not path.name.startswith("."))
        found[kind] = {}
        for path in files:
            first = found[kind].setdefault(path.relative_to(folder / kind).with_suffix(""), path)
            if first is not path:
                raise ValueError(f"{first} and {path} are two of one name")
        for place in [folder / kind, *(path for path in (folder / kind).iterdir() if path.is_dir())]:
            if not any(place in path.parents for path in files):
                raise ValueError(f"{place} is empty")
    for one, other in (("images", "annotations"), ("annotations", "images")):
        for stem in found[one].keys() - found[other].keys():
            raise ValueError(f"{found[one][stem]}: there is no {folder / other / stem}")
    splits: dict[str, list[Path]] = {}
    for stem in found["images"]:
        splits.setdefault(split_name(stem.parts[0]) if len(stem.parts) > 1 else "train", []).append(stem)
    picture = datasets.Image(decode=False)
    features = datasets.Features({keys.image: picture, keys.annotation: picture})
    tables = {}
    for split, stems in splits.items():
        columns = {keys.image: [str(found["images"][stem]) for stem in stems]}
        columns[keys.annotation] = [str(found["annotations"][stem]) for stem in stems]
        names = [f"{folder}, {stem}" for stem in stems]
        tables[split] = Table(datasets.Dataset.from_dict(columns, features=features), names.__getitem__)
    return tables
