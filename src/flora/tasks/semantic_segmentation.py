"""Semantic segmentation: UperNet over any backbone, or any segmentation model of transformers; mIoU."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.tasks.backbone import load_backbone, map_norms
from flora.tasks.base import Task
from flora.tasks.data import Pictures, Table, check_each, need_columns, open_image, read, split_name, three
from flora.tasks.pretrained import Pretrained

HEADS = ("decode_head", "auxiliary_head", "segmentation_head", "classifier", "head")
IGNORED = 255  # the label that transformers' segmentation losses leave out


@dataclass
class Scenes(Pictures):
    """Which pictures there are, with a picture of labels each, and how they are shown."""

    path: str = field(
        default="data",
        metadata={"help": "parquet, a hub name, or a folder with images/ and annotations/ of equal stems"},
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


@dataclass
class SemanticSegmentation(Task):
    name: str = field(default="semantic_segmentation", metadata={"help": "the job"})
    model: Pretrained = field(default_factory=Pretrained)
    backbone: Pretrained | None = field(
        default=None, metadata={"help": "what a model given by its config is built on (by default an UperNet)"}
    )
    data: Scenes = field(default_factory=Scenes)

    metric = "mIoU"

    def splits(self, seed: int) -> dict[str, LabelledScenes]:
        splits = three(self._tables, self.data, seed, self.data.path)
        return {
            name: LabelledScenes(table, self.data, self.data.augment and name == "train")
            for name, table in splits.items()
        }

    def check(self, splits: dict[str, LabelledScenes]) -> None:
        tables, classes = [examples.table for examples in splits.values()], self.classes
        shape = None if self.data.size else open_image(splits["train"].table, 0, self.data.image).size
        check_each(tables, lambda table, index: self._check(table, index, classes, shape))

    def _check(self, table: Table, index: int, classes: int, shape: tuple[int, int] | None) -> None:
        keys, labels = self.data, _labels(table, index, self.data)
        picture = open_image(table, index, keys.image)
        if picture.size != labels.shape[::-1]:
            sizes = " and ".join(f"{width} × {height}" for width, height in (picture.size, labels.shape[::-1]))
            raise ValueError(f"{table.name(index)}: {keys.image!r} and {keys.annotation!r} differ in size, {sizes}")
        if shape and picture.size != shape:
            raise ValueError(f"{table.name(index)}: not of the first picture's size; give task.data.size")
        if len(strange := labels[(labels >= classes) & (labels != IGNORED)]):
            first = int(keys.reduce_labels)
            raise ValueError(
                f"{table.name(index)}: {keys.annotation!r} has label {strange[0] + first}, expected {first} to "
                f"{classes - 1 + first}, or one of task.data.ignore={keys.ignore}"
            )

    @cached_property
    def _tables(self) -> dict[str, Table]:
        keys, folder = self.data, Path(self.data.path)
        paired = (folder / "images").is_dir() and (folder / "annotations").is_dir()
        tables = _pairs(folder, keys) if paired else read(keys.path, images=[keys.image, keys.annotation])
        need_columns(tables, keys.image, keys.annotation)
        return tables

    @cached_property
    def classes(self) -> int:
        if self.data.classes:
            return self.data.classes
        found: list[int] = []  # appending is safe in several threads

        def look(table: Table, index: int) -> None:
            labels = _labels(table, index, self.data)
            found.append(int(labels[labels != IGNORED].max(initial=0)))

        check_each(self._tables.values(), look)
        return max([*found, 1]) + 1

    def build(self) -> nn.Module:
        if self.backbone is None:
            model = self.model.load("AutoModelForSemanticSegmentation", HEADS, num_labels=self.classes)
        elif self.model.name:
            raise ValueError(f"task.backbone: a named model ({self.model.name}) brings its own")
        else:
            body = load_backbone(self.backbone)
            around = Pretrained(config={"model_type": "upernet", **self.model.config}, weights=self.model.weights)
            keys = {"num_labels": self.classes, "backbone_config": body.config}
            model = around.load("AutoModelForSemanticSegmentation", HEADS, **keys)
            model.backbone = body
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm
        return model

    def head(self, model: nn.Module) -> list[str]:
        """The decoder, and the norms that a backbone has for its maps only."""
        names = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
        if not names:
            raise ValueError(f"{type(model).__name__} has none of the heads {', '.join(HEADS)}")
        return names + map_norms(model)

    @staticmethod
    def reduce(logits: Any, labels: Tensor) -> Tensor:
        """Each image's pixels by class: rightly predicted, labelled, predicted.

        ``logits`` (batch, classes, h, w), or a tuple that starts with them; ``labels`` (batch, height, width). Returns
        (batch, 3, classes), which is all of the confusion matrix that IoU and accuracy need.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
        predicted, (batch, classes) = logits.argmax(1), logits.shape[:2]
        counted = (labels >= 0) & (labels < classes)
        image = torch.arange(batch, device=labels.device).view(-1, 1, 1) * (classes + 1)

        def pixels(values: Tensor, where: Tensor) -> Tensor:
            places = image + values.where(where, classes)
            return places.flatten().bincount(minlength=batch * (classes + 1)).view(batch, -1)[:, :classes]

        right = counted & (predicted == labels)
        return torch.stack([pixels(labels, right), pixels(labels, counted), pixels(predicted, counted)], 1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Of all pixels of a split together; means are over the classes that have labels in it."""
        right, labelled, predicted = prediction.predictions.sum(0)
        occurs = labelled > 0
        right, labelled, predicted = right[occurs], labelled[occurs], predicted[occurs]
        return {
            "mIoU": float((right / (labelled + predicted - right)).mean()),
            "mAcc": float((right / labelled).mean()),
            "accuracy": float(right.sum() / labelled.sum()),
        }


class BatchNorm(nn.BatchNorm2d):
    """With its running statistics where a batch has one value a channel: UperNet pools an image to one pixel, and the
    last batch of an epoch may be one image."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


@dataclass
class LabelledScenes:
    """A table's pictures (channels, height, width) and their labels (height, width)."""

    table: Table
    keys: Scenes
    augment: bool

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as V

        keys = self.keys
        picture = open_image(self.table, index, keys.image).convert("L" if len(keys.mean) == 1 else "RGB")
        image = V.to_dtype(V.to_image(picture), torch.float32, scale=True)
        labels = torch.from_numpy(_labels(self.table, index, keys))[None]
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


def _labels(table: Table, index: int, keys: Scenes) -> Any:
    """A row's labels, a numpy array of bytes (height, width): classes from 0, and IGNORED."""
    import numpy as np

    picture = open_image(table, index, keys.annotation)
    raw = np.array(picture)
    if raw.ndim != 2:
        raise ValueError(
            f"{table.name(index)}: {keys.annotation!r} is of mode {picture.mode}, expected one channel of labels"
        )
    if raw.min() < 0 or raw.max() > IGNORED:
        raise ValueError(f"{table.name(index)}: {keys.annotation!r} has label {raw.max()}, expected 0 to {IGNORED}")
    ours = np.arange(IGNORED + 1)
    ours[[*keys.ignore, IGNORED]] = IGNORED
    if keys.reduce_labels:
        ours = np.where((ours == 0) | (ours == IGNORED), IGNORED, ours - 1)
    return ours.astype("uint8")[raw.astype("uint8")]


def _pairs(folder: Path, keys: Scenes) -> dict[str, Table]:
    """Of images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png; without the SPLIT all are train."""
    import datasets

    found: dict[str, dict[Path, Path]] = {}
    for kind in ("images", "annotations"):
        files = sorted(path for path in (folder / kind).rglob("*") if path.is_file() and not path.name.startswith("."))
        found[kind] = {path.relative_to(folder / kind).with_suffix(""): path for path in files}
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
