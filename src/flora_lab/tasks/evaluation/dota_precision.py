"""DOTA's Task 1: the detections of overlapping tiles joined, and the average precision of oriented boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flora_lab.tasks.data.dota import corners

if TYPE_CHECKING:
    import numpy as np

IOUS = tuple(0.5 + 0.05 * n for n in range(10))


@dataclass
class Boxes:
    """Oriented boxes of one picture: ``quads`` (n, 4, 2) and ``classes`` (n,), with the scores of detections or with
    ``difficult`` of the truth."""

    quads: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None
    difficult: np.ndarray | None = None


def joined(boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, overlap: float) -> Boxes:
    """The detections of all tiles of a picture, rectangles (n, 5) in its pixels, without those of a class that overlap
    a better one by an IoU above ``overlap``."""
    import numpy as np
    import torch

    from flora_lab.tasks.models.oriented_rcnn import rotated_nms

    kept = [np.zeros(0, dtype=int)]
    for number in np.unique(classes):
        (places,) = np.nonzero(classes == number)
        chosen = [torch.as_tensor(values[places]).float() for values in (boxes, scores)]
        kept.append(places[rotated_nms(*chosen, overlap, force_cpu=True).numpy()])
    order = np.concatenate(kept)
    return Boxes(corners(boxes[order]), classes[order], scores[order])


def precisions(truth: Sequence[Boxes], found: Sequence[Boxes]) -> dict[str, float]:
    """ "AP50" and "AP75", and "mAP", the mean over the IoUs .50, .55, …, .95; each the mean over classes.

    As DOTA's development kit: a detection belongs to the object that it overlaps most. It is right if the IoU is above
    the threshold and no better detection has that object, does not count if the object is difficult, and is wrong else.
    Average precision by 11 points of recall. Classes without an object that counts are left out.
    """
    import numpy as np

    counted = {int(number) for one in truth for number in one.classes[~one.difficult]}
    table = np.array([_class_precisions(truth, found, number) for number in sorted(counted)])  # (classes, IoUs)
    means = table.mean(0)
    return {"mAP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def _class_precisions(truth: Sequence[Boxes], found: Sequence[Boxes], number: int) -> list[float]:
    """Of one class, by IoU."""
    import numpy as np

    best, objects, scores, difficult, first = [], [], [], [], 0
    for real, one in zip(truth, found, strict=True):
        own, mine = real.classes == number, one.classes == number
        overlaps = overlap(one.quads[mine], real.quads[own])
        best.append(overlaps.max(1, initial=0.0))
        objects.append(first + overlaps.argmax(1) if own.any() else np.full(mine.sum(), -1))
        scores.append(one.scores[mine])
        difficult.append(real.difficult[own])
        first += int(own.sum())
    best, objects, scores, difficult = map(np.concatenate, (best, objects, scores, difficult))
    order = np.argsort(-scores, kind="stable")
    return [_average(best[order] > iou, objects[order], difficult) for iou in IOUS]


def _average(near: np.ndarray, objects: np.ndarray, difficult: np.ndarray) -> float:
    """Average precision of detections by score: whether each is near its object, which one that is, and of all objects
    whether they are difficult."""
    import numpy as np

    right = np.zeros(len(near), dtype=bool)
    counts = np.ones(len(near), dtype=bool)
    taken = set()
    for n, one in enumerate(objects.tolist()):
        if near[n] and difficult[one]:
            counts[n] = False
        elif near[n] and one not in taken:
            taken.add(one)
            right[n] = True
    right = np.cumsum(right[counts])
    recall, precision = right / (~difficult).sum(), right / np.arange(1, len(right) + 1)
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in np.linspace(0, 1, 11)]))


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU (n, m) of convex quadrilaterals (n, 4, 2) and (m, 4, 2)."""
    import numpy as np
    import shapely

    ours, theirs = shapely.polygons(one), shapely.polygons(other)
    found = np.zeros((len(one), len(other)))
    if len(one) and len(other):
        left, right = shapely.STRtree(theirs).query(ours)
        common = shapely.area(shapely.intersection(ours[left], theirs[right]))
        found[left, right] = common / (shapely.area(ours[left]) + shapely.area(theirs[right]) - common)
    return found
