"""COCO's format: images and objects read and looked through, and predictions judged by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora.tasks.data import split_name

SLACK = 1  # pixels that a box may stick out of its image: annotation tools round


@dataclass
class Annotated:
    """An image's objects: ``boxes`` of left, top, width, height; ``classes`` from 1; ``masks`` as in the file."""

    name: str
    file: str
    height: int
    width: int
    boxes: list[list[float]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)

    def rle(self, index: int) -> dict[str, Any]:
        """pycocotools' compressed run lengths of a mask."""
        from pycocotools import mask

        given = self.masks[index]
        if isinstance(given, list):
            return mask.merge(mask.frPyObjects(given, self.height, self.width))
        return given if isinstance(given["counts"], str) else mask.frPyObjects(given, self.height, self.width)

    def objects(self) -> tuple[Tensor, Tensor, Tensor]:
        """To train on: boxes (n, 4) of left, top, right, bottom, cut to the image; classes (n,); masks (n, h, w)."""
        from pycocotools import mask

        kept = [index for index, crowd in enumerate(self.crowds) if not crowd]
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
    """``images`` of all splits, and which places in that list are a split's; class n is the n-th of ``categories``."""

    images: list[Annotated]
    splits: dict[str, range]
    categories: list[dict[str, Any]]


def read(folder: Path, drop_empty: bool) -> Source:
    """NAME.json, or annotations/instances_NAME.json, with images in the folder NAME. Raises ValueError naming file and
    row; boxes without area are refused, or left out if ``drop_empty``."""
    source = Source([], {}, [])
    for split, file, images in _files(folder):
        content = _load(file)
        own = sorted(content["categories"], key=lambda category: category["id"])
        source.categories = source.categories or own
        before, now = ({one["id"]: one["name"] for one in some} for some in (source.categories, own))
        if differ := before.items() ^ now.items():
            raise ValueError(f"{file}: categories differ from the other splits' in {min(differ)}")
        found = _annotated(file, images, content, list(now), drop_empty)
        source.splits[split] = range(len(source.images), len(source.images) + len(found))
        source.images += found
    return source


def _files(folder: Path) -> list[tuple[str, Path, Path]]:
    """(split, JSON, folder of its images) for "train2017" and its like."""
    found = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("annotations/instances_*.json")]):
        name = file.stem.removeprefix("instances_")
        if (folder / name).is_dir():
            found.append((split_name(re.sub(r"[\d_.-]+$", "", name)), file, folder / name))
    splits = [split for split, _, _ in found]
    if "train" not in splits or len(set(splits)) < len(splits):
        raise ValueError(
            f"{folder}: expected NAME.json or annotations/instances_NAME.json beside a folder NAME of images, "
            f"with NAME train, val or test once; found {', '.join(str(file) for _, file, _ in found) or 'none'}"
        )
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    needed = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("image_id", "category_id", "bbox", "segmentation"),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{file}: expected a list of {part}")
        for row, entry in enumerate(rows):
            for key in keys:
                if not isinstance(entry, dict) or key not in entry:
                    raise ValueError(f"{file}, {part}, row {row}: no {key!r}")
    return content


def _annotated(file: Path, folder: Path, content: dict, categories: list[int], drop_empty: bool) -> list[Annotated]:
    images: dict[int, Annotated] = {}
    for entry in content["images"]:
        if entry["id"] in images:
            raise ValueError(f"{file}: two images have the id {entry['id']}")
        name = f"{file}, image {entry['id']}"
        images[entry["id"]] = Annotated(name, str(folder / entry["file_name"]), entry["height"], entry["width"])
    classes = {category: place for place, category in enumerate(categories, start=1)}
    for row, entry in enumerate(content["annotations"]):
        where = f"{file}, annotations, row {row}"
        if entry["image_id"] not in images:
            raise ValueError(f"{where}: there is no image {entry['image_id']}")
        if entry["category_id"] not in classes:
            raise ValueError(
                f"{where}: there is no category {entry['category_id']}, but {', '.join(map(str, classes))}"
            )
        image = images[entry["image_id"]]
        empty = _check_box(where, entry["bbox"], image)
        if empty and drop_empty:
            continue
        if empty:
            raise ValueError(f"{where}: box {entry['bbox']} has no area; task.data.drop_empty=true leaves such out")
        _check_mask(where, entry["segmentation"], image)
        image.boxes.append(entry["bbox"])
        image.classes.append(classes[entry["category_id"]])
        image.masks.append(entry["segmentation"])
        image.areas.append(entry.get("area"))
        image.crowds.append(bool(entry.get("iscrowd")))
    return list(images.values())


def _check_box(where: str, box: Any, image: Annotated) -> bool:
    """Whether it has no area."""
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(x, int | float) and math.isfinite(x) for x in box)
    ):
        raise ValueError(f"{where}: box {box}, expected left, top, width and height in pixels")
    left, top, width, height = box
    if min(left, top) < -SLACK or left + width > image.width + SLACK or top + height > image.height + SLACK:
        raise ValueError(f"{where}: box {box} is outside of its image of {image.width} × {image.height}")
    return width <= 0 or height <= 0


def _check_mask(where: str, given: Any, image: Annotated) -> None:
    if isinstance(given, dict):
        if given.get("size") != [image.height, image.width] or not isinstance(given.get("counts"), str | list):
            raise ValueError(
                f"{where}: mask of height and width {given.get('size')}, its image is {[image.height, image.width]}"
            )
        if isinstance(given["counts"], list) and sum(given["counts"]) != image.height * image.width:
            raise ValueError(f"{where}: the mask's counts do not add up to {image.height} × {image.width} pixels")
    elif (
        not isinstance(given, list)
        or not given
        or not all(isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 for ring in given)
    ):
        raise ValueError(f"{where}: expected a mask of run lengths, or polygons of three or more points")


# ---------------------------------------------------------------------------------------------------------- judging


def pasted(masks: Any, boxes: Any, image: Annotated) -> list[dict[str, Any]]:
    """Probabilities (n, 28, 28) in boxes (n, 4) as run lengths of the whole image."""
    import numpy as np
    from pycocotools import mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    probabilities = torch.as_tensor(masks).float()[:, None]
    whole = paste_masks_in_image(probabilities, torch.as_tensor(boxes), (image.height, image.width))
    there = (whole[:, 0] > 0.5).numpy().astype("uint8")
    return [mask.encode(np.asfortranarray(one)) for one in there]


def truth_of(source: Source, places: list[int]) -> Any:
    """pycocotools' COCO of some images; a category's id is its class."""
    from pycocotools import mask
    from pycocotools.coco import COCO

    annotations = []
    for place in places:
        image = source.images[place]
        for index, box in enumerate(image.boxes):
            run_lengths = image.rle(index)
            area = image.areas[index]
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 means no match to pycocotools
                    "image_id": place,
                    "category_id": image.classes[index],
                    "bbox": box,
                    "segmentation": run_lengths,
                    "area": float(mask.area(run_lengths)) if area is None else area,
                    "iscrowd": int(image.crowds[index]),
                }
            )
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": p, "height": source.images[p].height, "width": source.images[p].width} for p in places],
        "annotations": annotations,
        "categories": [{"id": number} for number, _ in enumerate(source.categories, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def precisions(truth: Any, found: list[dict[str, Any]], kind: str, detections: int) -> dict[str, float]:
    """COCO's average precisions of "segm" or "bbox", with up to so many detections an image.

    "mAP" is the mean over the IoUs .50, .55, …, .95; "APs", "APm", "APl" are that of small, medium and large objects
    (up to 32², 96² pixels), and left out where there are none.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        judged = COCOeval(truth, truth.loadRes(found) if found else type(truth)(), kind)  # it can't load nothing
        judged.params.imgIds, judged.params.maxDets = sorted(truth.imgs), [1, 10, detections]
        judged.evaluate()
        judged.accumulate()
    precision = judged.eval["precision"][..., -1]  # (IoUs, recalls, categories, sizes), -1 where there is no object
    cuts = {
        "mAP": precision[..., 0],
        "AP50": precision[0, ..., 0],
        "AP75": precision[5, ..., 0],
        "APs": precision[..., 1],
        "APm": precision[..., 2],
        "APl": precision[..., 3],
    }
    return {name: float(cut[cut > -1].mean()) for name, cut in cuts.items() if (cut > -1).any()}
