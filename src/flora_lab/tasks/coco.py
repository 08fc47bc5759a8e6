"""COCO's format: images and objects read, and predictions judged by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_lab.tasks.coco_check import box_is_empty, check_fields, mask_is_empty, short
from flora_lab.tasks.data import split_name


@dataclass
class Annotated:
    """An image's objects, of ``rows`` in the JSON ``listing``: ``boxes`` of left, top, width, height; ``classes`` from
    1; ``masks`` as in the JSON."""

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
        """Places of the objects that are no crowds."""
        return [index for index, crowd in enumerate(self.crowds) if not crowd]

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
    """``images`` of all splits, and which places in that list are a split's; class n is the n-th of ``categories``."""

    images: list[Annotated]
    splits: dict[str, range]
    categories: list[dict[str, Any]]


def read(folder: Path, drop_empty: bool) -> Source:
    """NAME.json, or annotations/instances_NAME.json, with images in the folder NAME. Raises ValueError naming file and
    row; objects without area are refused, or left out if ``drop_empty``."""
    source = Source([], {}, [])
    for split, file, images in _files(folder):
        content = _load(file)
        own = [category for _, category in sorted(_by_id(file, content, "categories").items())]
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
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    check_fields(str(file), content)
    return content


def _by_id(file: Path, content: dict[str, Any], part: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for entry in content[part]:
        if entry["id"] in found:
            raise ValueError(f"{file}: two {part} have the id {entry['id']}")
        found[entry["id"]] = entry
    return found


def _annotated(file: Path, folder: Path, content: dict, categories: list[int], drop_empty: bool) -> list[Annotated]:
    images = {
        key: Annotated(file, key, str(folder / entry["file_name"]), entry["height"], entry["width"])
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
            said = f"{key}={short(entry[key])} has no area in its image of {image.width} × {image.height}"
            raise ValueError(f"{where}: {said}; task.data.drop_empty=true leaves such out")
        image.rows.append(row)
        image.boxes.append(entry["bbox"])
        image.classes.append(classes[entry["category_id"]])
        image.masks.append(entry["segmentation"])
        image.areas.append(entry.get("area"))
        image.crowds.append(bool(entry.get("iscrowd")))
    return list(images.values())


def need_objects(source: Source, splits: dict[str, list[Annotated]]) -> None:
    """In every split some that are no crowds, of classes that are in train too: what is never shown is not learned.

    Raises ValueError naming file and split, or annotation.
    """
    known = {image.classes[index] for image in splits["train"] for index in image.counted}
    for name, images in splits.items():
        if not any(image.counted for image in images):
            use = "learn from" if name == "train" else "judge"
            raise ValueError(f"{images[0].listing}: the {name} split has no object to {use}")
        for image in images:
            for index in image.counted:
                if (number := image.classes[index]) not in known:
                    where = f"{image.listing}, annotations, row {image.rows[index]}"
                    category = source.categories[number - 1]["id"]
                    raise ValueError(f"{where}: category_id={category} is not in the train split")


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
