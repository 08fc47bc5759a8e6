"""Semantic segmentation: UperNet over any backbone, or any segmentation model of transformers; mIoU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import Task
from flora_lab.tasks.data.pictures import open_image, read
from flora_lab.tasks.data.records import Records, check_each, need_columns, three
from flora_lab.tasks.data.scenes import IGNORED, Scenes, labels_of, read_pairs
from flora_lab.tasks.models.backbone import load_backbone, map_layers
from flora_lab.tasks.models.pretrained import Pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn

HEADS = ("decode_head", "auxiliary_head", "segmentation_head", "classifier", "head")


@dataclass
class SemanticSegmentation(Task):
    name: str = field(default="semantic_segmentation", metadata={"help": "the task"})
    model: Pretrained = field(default_factory=Pretrained)
    backbone: Pretrained | None = field(
        default=None, metadata={"help": "backbone of a model given by config (default: an UperNet)"}
    )
    data: Scenes = field(default_factory=Scenes)

    metric = "mIoU"

    def splits(self, seed: int) -> dict[str, LabelledScenes]:
        splits = three(self._records, self.data, seed, self.data.path)
        return {
            name: LabelledScenes(records, self.data, self.data.augment and name == "train")
            for name, records in splits.items()
        }

    def check(self, splits: dict[str, LabelledScenes]) -> None:
        """Also that train has every class of the test split, unless only some of its examples are used."""
        keys, train = self.data, splits["train"].records
        shape = None if keys.size else open_image(train, 0, keys.image).size
        labels = {name: self._labels(examples.records, shape) for name, examples in splits.items()}
        for name, some in labels.items():
            if not some:
                left_out = f"task.data.ignore={keys.ignore} and task.data.reduce_labels={keys.reduce_labels}"
                raise ValueError(f"{keys.path}: the {name} split has no labelled pixel, with {left_out}")
        for label in sorted(labels["test"].keys() - labels["train"].keys()) if keys.train_examples is None else ():
            name = splits["test"].records.name(labels["test"][label])
            problem = f"label {label + keys.reduce_labels} is not in the train split"
            raise ValueError(f"{name}: {problem}; task.data.ignore leaves a label out")

    def _labels(self, records: Records, shape: tuple[int, int] | None) -> dict[int, int]:
        """Each label that is not ignored, with the index of a record that has it."""
        classes, labels = self.classes, {}

        def look(records: Records, index: int) -> None:
            labels.update(dict.fromkeys(self._labels_of(records, index, classes, shape), index))  # thread-safe

        check_each([records], look)
        return labels

    def _labels_of(self, records: Records, index: int, classes: int, shape: tuple[int, int] | None) -> set[int]:
        """A record's labels that are not ignored. Raises ValueError if sizes or labels are wrong."""
        import numpy as np

        keys, labels = self.data, labels_of(records, index, self.data)
        picture = open_image(records, index, keys.image, len(keys.mean))
        if picture.size != labels.shape[::-1]:
            sizes = " and ".join(f"{width} × {height}" for width, height in (picture.size, labels.shape[::-1]))
            raise ValueError(f"{records.name(index)}: {keys.image!r} and {keys.annotation!r} differ in size, {sizes}")
        if shape and picture.size != shape:
            raise ValueError(f"{records.name(index)}: not of the first picture's size; set task.data.size")
        present = set(np.flatnonzero(np.bincount(labels.ravel())).tolist()) - {IGNORED}
        if wrong := [label for label in present if label >= classes]:
            first = int(keys.reduce_labels)
            raise ValueError(
                f"{records.name(index)}: {keys.annotation!r} has label {wrong[0] + first}, expected {first} to "
                f"{classes - 1 + first}, or one of task.data.ignore={keys.ignore}"
            )
        return present

    @cached_property
    def _records(self) -> dict[str, Records]:
        keys, folder = self.data, Path(self.data.path)
        paired = (folder / "images").is_dir() and (folder / "annotations").is_dir()
        splits = read_pairs(folder, keys) if paired else read(keys.path, images=[keys.image, keys.annotation])
        need_columns(splits, keys.image, keys.annotation)
        return splits

    @cached_property
    def classes(self) -> int:
        if self.data.classes:
            return self.data.classes
        largest: list[int] = []

        def look(records: Records, index: int) -> None:
            labels = labels_of(records, index, self.data)
            largest.append(int(labels[labels != IGNORED].max(initial=0)))  # thread-safe

        check_each(self._records.values(), look)
        return max([*largest, 1]) + 1

    def build(self) -> nn.Module:
        from torch import nn

        from flora_lab.tasks.models.batch_norm import BatchNorm
        from flora_lab.tasks.models.vit_pyramid import VitPyramid

        if self.backbone is None:
            model = self.model.load("AutoModelForSemanticSegmentation", HEADS, num_labels=self.classes)
        elif self.model.name:
            raise ValueError(f"task.backbone: a named model ({self.model.name}) has its own")
        else:
            backbone = load_backbone(self.backbone)
            # the decoder makes a backbone of its own, which is not used
            small = backbone.config.shallow() if isinstance(backbone, VitPyramid) else backbone.config
            keys = {"num_labels": self.classes, "backbone_config": small}
            model = self.model.load("AutoModelForSemanticSegmentation", HEADS, "upernet", **keys)
            model.backbone, model.config.backbone_config = backbone, backbone.config
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm
        return model

    def head(self, model: nn.Module) -> list[str]:
        """The decoder, and what the backbone applies to its maps only."""
        from torch import nn

        names = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
        if not names:
            raise self.model.fault(f"{type(model).__name__} has no head named {', '.join(HEADS)}")
        return names + map_layers(model)

    @staticmethod
    def reduce(logits: Any, labels: Tensor) -> Tensor:
        """Count each image's pixels by class: correctly predicted, labelled, predicted.

        ``logits`` (batch, classes, h, w), or a tuple that starts with them; ``labels`` (batch, height, width). Returns
        (batch, 3, classes): all that IoU and accuracy need of the confusion matrix; -1 for an image whose logits are
        not finite.
        """
        import torch
        import torch.nn.functional as F

        logits = logits[0] if isinstance(logits, tuple) else logits
        finite = logits.isfinite().flatten(1).all(1)
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
        predicted, (batch, classes) = logits.argmax(1), logits.shape[:2]
        counted = (labels >= 0) & (labels < classes)
        image = torch.arange(batch, device=labels.device).view(-1, 1, 1) * (classes + 1)

        def pixels(values: Tensor, where: Tensor) -> Tensor:
            places = image + values.where(where, classes)
            return places.flatten().bincount(minlength=batch * (classes + 1)).view(batch, -1)[:, :classes]

        right = counted & (predicted == labels)
        counts = torch.stack([pixels(labels, right), pixels(labels, counted), pixels(predicted, counted)], 1)
        return counts.where(finite[:, None, None], -1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Over all labelled pixels of a split, as in MMSegmentation: mIoU is the mean over the classes that are
        labelled or predicted, mAcc over those that are labelled. All NaN if the model diverged."""
        if (prediction.predictions < 0).any():
            return dict.fromkeys(("mIoU", "mAcc", "accuracy"), math.nan)
        right, labelled, predicted = prediction.predictions.sum(0)
        union = labelled + predicted - right
        return {
            "mIoU": float((right[union > 0] / union[union > 0]).mean()),
            "mAcc": float((right[labelled > 0] / labelled[labelled > 0]).mean()),
            "accuracy": float(right.sum() / labelled.sum()),
        }


@dataclass
class LabelledScenes:
    """Pictures (channels, height, width) and their labels (height, width)."""

    records: Records
    keys: Scenes
    augment: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch
        import torch.nn.functional as F
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as V

        keys = self.keys
        picture = open_image(self.records, index, keys.image, len(keys.mean))
        image = V.to_dtype(V.to_image(picture), torch.float32, scale=True)
        labels = torch.from_numpy(labels_of(self.records, index, keys))[None]
        height, width = keys.size or labels.shape[1:]
        scale = min(height / labels.shape[1], width / labels.shape[2])
        if self.augment:
            height, width = keys.crop or (height, width)
            scale *= 2 ** (2 * torch.rand(()).item() - 1)
        if scale != 1:
            shape = [max(round(side * scale), 1) for side in labels.shape[1:]]
            image = V.resize(image, shape)
            labels = V.resize(labels, shape, InterpolationMode.NEAREST_EXACT)
        image = V.normalize(image, keys.mean, keys.std)
        if self.augment:
            top, left = (
                int(torch.randint(max(side - most, 0) + 1, ()))
                for side, most in zip(labels.shape[1:], (height, width), strict=True)
            )
            image, labels = (x[:, top : top + height, left : left + width] for x in (image, labels))
            if torch.rand(()) < 0.5:
                image, labels = image.flip(-1), labels.flip(-1)
        below = [0, width - labels.shape[2], 0, height - labels.shape[1]]
        return {"pixel_values": F.pad(image, below), "labels": F.pad(labels, below, value=IGNORED)[0].long()}
