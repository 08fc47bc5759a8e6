"""COCO's format: images and their objects, read and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.files import local_path
from flora_lab.tasks.data.coco_check import box_is_empty, check_fields, mask_is_empty, short
from flora_lab.tasks.data.records import split_name
from flora_lab.tasks.data.texts import parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class AnnotatedImage:
    """An image and its objects, which are ``rows`` of the annotations in the JSON file ``listing``.

    ``boxes``: left, top, width, height. ``classes``: from 1. ``masks``: as in the JSON.
    """

    listing: Path
    id: int | str
    file: str
    height: int
    width: int
    rows: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.listing}, image {self.id}"

    @property
    def counted(self) -> list[int]:
        """Indices of the objects that are not crowds."""
        return [index for index, crowd in enumerate(self.crowds) if not crowd]

    def rle(self, index: int) -> dict[str, Any]:
        """A mask as pycocotools' compressed run lengths."""
        from pycocotools import mask

        entry = self.masks[index]
        if isinstance(entry, list):
            return mask.merge(mask.frPyObjects(entry, self.height, self.width))
        return entry if isinstance(entry["counts"], str) else mask.frPyObjects(entry, self.height, self.width)

    def objects(self) -> tuple[Tensor, Tensor, Tensor]:
        """For training: boxes (n, 4) of left, top, right, bottom, cut to the image; classes (n,); masks (n, h, w)."""
        import torch
        from pycocotools import mask

        kept = self.counted
        boxes = torch.tensor([self.boxes[index] for index in kept], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, self.width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, self.height)
        masks = torch.zeros(len(kept), self.height, self.width, dtype=torch.uint8)
        for row, index in enumerate(kept):
            masks[row] = torch.from_numpy(mask.decode(self.rle(index)))
        return boxes, torch.tensor([self.classes[index] for index in kept], dtype=torch.int64), masks


# ------------------------------------------------------------------------------------------------------------ files


@dataclass
class Source:
    """``images`` of all splits, each split's places in that list, and ``categories``, of which class n is the n-th."""

    images: list[AnnotatedImage]
    splits: dict[str, range]
    categories: list[dict[str, Any]]


def read(folder: Path, drop_empty: bool) -> Source:
    """Read NAME.json, or annotations/instances_NAME.json, with images in the folder NAME.

    ``drop_empty``: leave out objects without area, which are errors otherwise. Raises ValueError naming file and row.
    """
    local_path(folder)  # raises, if there is none
    source = Source([], {}, [])
    for split, file, images in _files(folder):
        content = _load(file)
        own = [category for _, category in sorted(_by_id(file, content, "categories").items())]
        source.categories = source.categories or own
        before, now = ({one["id"]: one["name"] for one in some} for some in (source.categories, own))
        if differ := before.items() ^ now.items():
            raise ValueError(f"{file}: categories differ from the other splits' in {min(differ)}")
        annotated = _images(file, images, content, list(now), drop_empty)
        source.splits[split] = range(len(source.images), len(source.images) + len(annotated))
        source.images += annotated
    return source


def _files(folder: Path) -> list[tuple[str, Path, Path]]:
    """(split, JSON, folder of its images); the split of train2017 is "train"."""
    files = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("annotations/instances_*.json")]):
        name = file.stem.removeprefix("instances_")
        if (folder / name).is_dir():
            files.append((split_name(re.sub(r"[\d_.-]+$", "", name)), file, folder / name))
    splits = [split for split, _, _ in files]
    if "train" not in splits or len(set(splits)) < len(splits):
        raise ValueError(
            f"{folder}: expected NAME.json or annotations/instances_NAME.json beside a folder NAME of images, "
            f"with NAME train, val or test once; found {', '.join(str(file) for _, file, _ in files) or 'none'}"
        )
    return files


def _load(file: Path) -> dict[str, Any]:
    content = parse_json(read_text(file), file)
    check_fields(str(file), content)
    return content


def _by_id(file: Path, content: dict[str, Any], part: str) -> dict[Any, dict[str, Any]]:
    entries: dict[Any, dict[str, Any]] = {}
    for entry in content[part]:
        if entry["id"] in entries:
            raise ValueError(f"{file}: two {part} have the id {entry['id']}")
        entries[entry["id"]] = entry
    return entries


def _images(file: Path, folder: Path, content: dict, categories: list[int], drop_empty: bool) -> list[AnnotatedImage]:
    images = {
        key: AnnotatedImage(file, key, str(folder / entry["file_name"]), entry["height"], entry["width"])
        for key, entry in _by_id(file, content, "images").items()
    }
    classes = {category: place for place, category in enumerate(categories, start=1)}
    for row, entry in enumerate(content["annotations"]):
        where = f"{file}, annotations, row {row}"
        if entry["image_id"] not in images:
            raise ValueError(f"{where}: image_id={short(entry['image_id'])}, there is no such image")
        if entry["category_id"] not in classes:
            accepted = ", ".join(map(str, classes))
            raise ValueError(f"{where}: category_id={short(entry['category_id'])}, expected one of {accepted}")
        image = images[entry["image_id"]]
        shapes = {"bbox": box_is_empty, "segmentation": mask_is_empty}
        empty = (key for key, is_empty in shapes.items() if is_empty(where, entry[key], image.height, image.width))
        if key := next(empty, None):
            if drop_empty:
                continue
            problem = f"{key}={short(entry[key])} has no area in its image of {image.width} × {image.height}"
            raise ValueError(f"{where}: {problem}; task.data.drop_empty=true leaves such objects out")
        image.rows.append(row)
        image.boxes.append(entry["bbox"])
        image.classes.append(classes[entry["category_id"]])
        image.masks.append(entry["segmentation"])
        image.areas.append(entry.get("area"))
        image.crowds.append(bool(entry.get("iscrowd")))
    return list(images.values())


def need_objects(source: Source, splits: dict[str, list[AnnotatedImage]]) -> None:
    """Raise ValueError, naming the file and the split or the annotation, if a split has no objects other than crowds,
    or a class that train lacks: it could not be learned."""
    known = {image.classes[index] for image in splits["train"] for index in image.counted}
    for name, images in splits.items():
        if not any(image.counted for image in images):
            use = "learn from" if name == "train" else "evaluate"
            raise ValueError(f"{images[0].listing}: the {name} split has no object to {use}")
        for image in images:
            for index in image.counted:
                if (number := image.classes[index]) not in known:
                    where = f"{image.listing}, annotations, row {image.rows[index]}"
                    category = source.categories[number - 1]["id"]
                    raise ValueError(f"{where}: category_id={category} is not in the train split")
