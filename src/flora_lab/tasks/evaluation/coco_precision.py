"""COCO's average precisions of masks and boxes, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from flora_lab.tasks.data.coco import AnnotatedImage, Source


def paste(masks: Any, boxes: Any, image: AnnotatedImage) -> list[dict[str, Any]]:
    """Probabilities (n, 28, 28) in boxes (n, 4) as masks of the whole image, in run lengths."""
    import numpy as np
    import torch
    from pycocotools import mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    probabilities = torch.as_tensor(masks).float()[:, None]
    whole = paste_masks_in_image(probabilities, torch.as_tensor(boxes), (image.height, image.width))
    binary = (whole[:, 0] > 0.5).numpy().astype("uint8")
    return [mask.encode(np.asfortranarray(one)) for one in binary]


def truth_of(source: Source, places: list[int]) -> Any:
    """pycocotools' COCO object of the images at ``places``; a category's id is its class."""
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
                    "id": len(annotations) + 1,  # for pycocotools, 0 means no match
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


def precisions(truth: Any, results: list[dict[str, Any]], kind: str, most: int) -> dict[str, float]:
    """COCO's average precisions; ``kind``: "segm" or "bbox"; ``most``: detections per image.

    "mAP" is the mean over the IoUs .50, .55, …, .95; "APs", "APm", "APl" are the same for small, medium and large
    objects (up to 32² and 96² pixels, and above), and left out if there are none.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        # loadRes does not take an empty list
        evaluation = COCOeval(truth, truth.loadRes(results) if results else type(truth)(), kind)
        evaluation.params.imgIds, evaluation.params.maxDets = sorted(truth.imgs), [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (IoUs, recalls, categories, sizes), -1 if there is no object
    cuts = {
        "mAP": precision[..., 0],
        "AP50": precision[0, ..., 0],
        "AP75": precision[5, ..., 0],
        "APs": precision[..., 1],
        "APm": precision[..., 2],
        "APl": precision[..., 3],
    }
    return {name: float(cut[cut > -1].mean()) for name, cut in cuts.items() if (cut > -1).any()}
