"""Scenes: pictures, each with a second picture that labels its pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora_lab.tasks.data.pictures import Pictures, open_image
from flora_lab.tasks.data.records import Records, split_name

IGNORED = 255  # transformers' segmentation losses ignore this label


@dataclass
class Scenes(Pictures):
    """Where the pictures and their labels come from, and how they are transformed."""

    path: str = field(
        default="data",
        metadata={
            "help": "a parquet file, a name on the hub, or a folder with images/ and annotations/ of equal stems",
            "path": True,
        },
    )
    image: str = field(default="image", metadata={"help": "column of the pictures"})
    annotation: str = field(default="annotation", metadata={"help": "column of the labels, pictures of one channel"})
    classes: int | None = field(default=None, metadata={"help": "number of classes; default: largest label + 1"})
    ignore: list[int] = field(default_factory=list, metadata={"help": f"labels to ignore, beside {IGNORED}"})
    reduce_labels: bool = field(default=False, metadata={"help": "ignore label 0; label 1 is the first class"})
    size: list[int] = field(
        default_factory=list, metadata={"help": "height and width: scale pictures to fit in it, and pad"}
    )
    crop: list[int] = field(default_factory=list, metadata={"help": "height and width of train's crops; default: size"})
    augment: bool = field(
        default=False, metadata={"help": "for train: random scales (half to twice), crops and mirroring"}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("size", "crop"):
            given = getattr(self, name)
            if given and (len(given) != 2 or min(given) < 1):
                raise ValueError(f"task.data.{name}={given}: expected a height and a width")
        if self.crop and not self.augment:
            raise ValueError(f"task.data.crop={self.crop}: crops need task.data.augment=true")
        if self.classes is not None and not 2 <= self.classes <= IGNORED:
            raise ValueError(f"task.data.classes={self.classes}: expected 2 to {IGNORED}")
        if wrong := [label for label in self.ignore if not 0 <= label <= IGNORED]:
            raise ValueError(f"task.data.ignore={self.ignore}: {wrong[0]} is not a label, expected 0 to {IGNORED}")


def labels_of(records: Records, index: int, keys: Scenes) -> Any:
    """A record's labels, a numpy array of bytes (height, width): classes from 0, and IGNORED."""
    import numpy as np

    picture = open_image(records, index, keys.annotation)
    raw = np.array(picture)
    if raw.ndim != 2 or raw.dtype.kind not in "biu":
        problem = f"{keys.annotation!r} is of mode {picture.mode}, expected one channel of whole numbers"
        raise ValueError(f"{records.name(index)}: {problem}")
    if len(wrong := raw[(raw < 0) | (raw > IGNORED)]):
        raise ValueError(f"{records.name(index)}: {keys.annotation!r} has label {wrong[0]}, expected 0 to {IGNORED}")
    mapping = np.arange(IGNORED + 1)
    mapping[[*keys.ignore, IGNORED]] = IGNORED
    if keys.reduce_labels:
        mapping = np.where((mapping == 0) | (mapping == IGNORED), IGNORED, mapping - 1)
    return mapping.astype("uint8")[raw.astype("uint8")]


def read_pairs(folder: Path, keys: Scenes) -> dict[str, Records]:
    """From images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png; without SPLIT, all are train.

    Raises ValueError naming a file without its counterpart.
    """
    import datasets

    images, annotations = (_by_stem(folder / part) for part in ("images", "annotations"))
    for part, own, others in (("annotations", images, annotations), ("images", annotations, images)):
        for stem in own.keys() - others.keys():
            raise ValueError(f"{own[stem]}: there is no {folder / part / stem}")
    stems: dict[str, list[Path]] = {}
    for stem in images:
        stems.setdefault(split_name(stem.parts[0]) if len(stem.parts) > 1 else "train", []).append(stem)
    picture = datasets.Image(decode=False)
    features = datasets.Features({keys.image: picture, keys.annotation: picture})
    splits = {}
    for split, some in stems.items():
        columns = {
            keys.image: [str(images[stem]) for stem in some],
            keys.annotation: [str(annotations[stem]) for stem in some],
        }
        names = [f"{folder}, {stem}" for stem in some]
        splits[split] = Records(datasets.Dataset.from_dict(columns, features=features), names.__getitem__)
    return splits


def _by_stem(folder: Path) -> dict[Path, Path]:
    """Files by their path without the ending. Raises ValueError if two are equal or a folder is empty."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    stems: dict[Path, Path] = {}
    for path in files:
        first = stems.setdefault(path.relative_to(folder).with_suffix(""), path)
        if first is not path:
            raise ValueError(f"{first} and {path} have the same name")
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        if not any(place in path.parents for path in files):
            raise ValueError(f"{place} is empty")
    return stems
