"""Instance segmentation: Mask R-CNN over any backbone, data in COCO's format, mAP of masks and boxes (pycocotools)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import Task
from flora_lab.tasks.data import coco
from flora_lab.tasks.data.pictures import Pictures, of_files, open_image
from flora_lab.tasks.data.records import Records, check_each, padded, three
from flora_lab.tasks.evaluation import coco_precision
from flora_lab.tasks.models.backbone import load_backbone, map_layers
from flora_lab.tasks.models.pretrained import Pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class CocoImages(Pictures):
    """Where the images come from. Crowds are not trained on, and COCO's evaluation ignores what is predicted there."""

    path: str = field(
        default="data",
        metadata={
            "help": "folder with NAME.json or annotations/instances_NAME.json, and images in folders NAME",
            "path": True,
        },
    )
    drop_empty: bool = field(default=False, metadata={"help": "leave out objects without area; else they are errors"})
    augment: bool = field(default=False, metadata={"help": "random mirroring for train"})

    def __post_init__(self):
        super().__post_init__()
        if len(self.mean) != 3:
            raise ValueError(f"task.data.mean={self.mean}: expected three numbers")


@dataclass
class Detector:
    """Sizes; the defaults are He et al.'s for COCO."""

    channels: int = field(default=256, metadata={"help": "width of the feature pyramid and the mask head", "least": 1})
    hidden: int = field(default=1024, metadata={"help": "width of the box head", "least": 1})
    anchors: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256, 512],
        metadata={"help": "sides in pixels, one per map of the backbone; one more adds a coarser map"},
    )
    size: list[int] = field(
        default_factory=lambda: [800],
        metadata={"help": "shorter side of an image in pixels; of several, train draws one, evaluation uses the last"},
    )
    longest: int = field(default=1333, metadata={"help": "longer side of an image, at most", "least": 1})
    proposals: int = field(default=1000, metadata={"help": "boxes per image for the second stage", "least": 1})
    samples: int = field(default=512, metadata={"help": "boxes per image that train the second stage", "least": 1})
    detections: int = field(default=100, metadata={"help": "detections per image, at most", "least": 1})

    def __post_init__(self):
        for name in ("anchors", "size"):
            given = getattr(self, name)
            if not given or min(given) < 1:
                raise ValueError(f"task.detector.{name}={given}: expected one or more numbers from 1")


@dataclass
class InstanceSegmentation(Task):
    name: str = field(default="instance_segmentation", metadata={"help": "the task"})
    backbone: Pretrained = field(default_factory=Pretrained)
    detector: Detector = field(default_factory=Detector)
    data: CocoImages = field(default_factory=CocoImages)

    metric = "mAP"

    def splits(self, seed: int) -> dict[str, CocoExamples]:
        images = self.source.images
        own = {
            split: of_files([images[place].file for place in places], [images[place].name for place in places], places)
            for split, places in self.source.splits.items()
        }
        splits = three(own, self.data, seed, self.data.path)
        used = {name: [images[place] for place in records.dataset["place"][:]] for name, records in splits.items()}
        coco.need_objects(self.source, used)
        return {
            name: CocoExamples(records, images, name == "train", self.data.augment) for name, records in splits.items()
        }

    def check(self, splits: dict[str, CocoExamples]) -> None:
        check_each((examples.records for examples in splits.values()), self._check)

    def _check(self, records: Records, index: int) -> None:
        image = self.source.images[records.dataset[index]["place"]]
        if not os.path.isfile(image.file):
            raise ValueError(f"{image.name}: there is no file {image.file}")
        picture = open_image(records, index, "image", 3)
        if picture.size != (image.width, image.height):
            sizes = f"{picture.width} × {picture.height}, not {image.width} × {image.height}"
            turned = picture.size == (image.height, image.width)
            hint = "; pictures are turned upright, as their EXIF says, and boxes count from there" if turned else ""
            raise ValueError(f"{records.name(index)} ({image.file}): the image is {sizes}{hint}")

    @cached_property
    def source(self) -> coco.Source:
        return coco.read(Path(self.data.path), self.data.drop_empty)

    def build(self) -> nn.Module:
        from flora_lab.tasks.models.mask_rcnn import MaskRCNN

        classes, keys = len(self.source.categories), self.data
        return MaskRCNN(load_backbone(self.backbone), classes, self.detector, keys.mean, keys.std)

    def head(self, model: nn.Module) -> list[str]:
        """All except the backbone; of that, the norms that it applies to its maps only."""
        return ["fpn", "rpn", "roi_heads", *map_layers(model)]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors padded with 0 to the largest, so that Trainer can move, split and gather them like any batch."""
        return padded(examples)

    def outputs(self, model: nn.Module, examples: Sequence[dict[str, Any]]) -> Tensor:
        """The first stage's logits: the detections do not depend smoothly on the weights."""
        import torch

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return torch.cat([base.objectness(example["pixel_values"][None]) for example in examples])

    def metrics(self, prediction: Any) -> dict[str, float]:
        """COCO's average precisions of masks ("mAP", "AP50", "AP75"; "APs", "APm", "APl" for small, medium and large
        objects, if there are any) and of boxes ("box_mAP", ...)."""
        places = prediction.label_ids.tolist()
        detections: dict[str, list[dict[str, Any]]] = {"segm": [], "bbox": []}
        for place, *outputs in zip(places, *prediction.predictions, strict=True):
            boxes, scores, classes, masks = (values[outputs[1] > 0] for values in outputs)
            pasted = coco_precision.paste(masks, boxes, self.source.images[place])
            for (left, top, right, bottom), score, number, mask in zip(boxes, scores, classes, pasted, strict=True):
                common = {"image_id": place, "category_id": int(number), "score": float(score)}
                detections["segm"].append({**common, "segmentation": mask})
                detections["bbox"].append(
                    {**common, "bbox": [float(x) for x in (left, top, right - left, bottom - top)]}
                )
        truth, most = coco_precision.truth_of(self.source, places), self.detector.detections
        boxes = coco_precision.precisions(truth, detections["bbox"], "bbox", most)
        return coco_precision.precisions(truth, detections["segm"], "segm", most) | {
            f"box_{name}": x for name, x in boxes.items()
        }


@dataclass
class CocoExamples:
    """Images (3, height, width) from 0 to 1, with their size and place in ``images``; for train also their objects."""

    records: Records
    images: list[coco.AnnotatedImage]
    train: bool
    mirror: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch
        from torchvision.transforms.v2 import functional as V

        picture = V.to_dtype(V.to_image(open_image(self.records, index, "image", 3)), torch.float32, scale=True)
        place = self.records.dataset[index]["place"]
        image = self.images[place]
        example = {"pixel_values": picture, "sizes": [image.height, image.width], "labels": place}
        if self.train:
            boxes, classes, masks = image.objects()
            if self.mirror and torch.rand(()) < 0.5:
                example["pixel_values"], masks = picture.flip(-1), masks.flip(-1)
                boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
            example |= {"boxes": boxes, "classes": classes, "masks": masks}
        return example
