"""Image classification: any image classifier of transformers (timm's among them), on images from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from flora.tasks.base import HEADS, Task
from flora.tasks.data import Pictures, Table, check_each, need_columns, need_known, open_image, read, three
from flora.tasks.pretrained import Pretrained

DIGITS = "digits"


@dataclass
class Images(Pictures):
    """Which images there are, and how they are shown."""

    path: str = field(default=DIGITS, metadata={"help": "digits (scikit-learn's), a folder, parquet, or a hub name"})
    image: str = field(default="image", metadata={"help": "column of the pictures"})
    label: str = field(default="label", metadata={"help": "column of their classes"})
    classes: list[int] = field(default_factory=list, metadata={"help": "the classes to tell apart, without it all"})
    rotate: int = field(default=0, metadata={"help": "degrees, counter-clockwise", "choices": (0, 90, 180, 270)})
    invert: bool = field(default=False, metadata={"help": "dark for light"})
    size: int | None = field(default=None, metadata={"help": "pixels to scale the shorter side and cut to", "least": 1})
    augment: bool = field(default=False, metadata={"help": "show train's images cropped at random, and mirrored"})

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"task.data.classes={self.classes}: expected two or more different classes, or none")


@dataclass
class ImageClassification(Task):
    name: str = field(default="image_classification", metadata={"help": "the job"})
    model: Pretrained = field(default_factory=Pretrained)
    data: Images = field(default_factory=Images)
    source: Images | None = field(default=None, metadata={"help": "what a base model is first trained on; as data"})

    metric = "accuracy"

    def source_task(self) -> ImageClassification | None:
        return self.source and replace(self, data=self.source, source=None)

    def splits(self, seed: int) -> dict[str, LabelledImages]:
        keys = self.data
        chosen = {name: _with(table, keys.label, self.classes) for name, table in self._tables.items()}
        splits = three(chosen, keys, seed, keys.path)
        need_known(splits, keys.label, lambda label: f"class {label}")
        return {
            name: LabelledImages(table, keys, self.classes, keys.augment and name == "train")
            for name, table in splits.items()
        }

    def check(self, splits: dict[str, LabelledImages]) -> None:
        tables = (examples.table for examples in splits.values())
        check_each(tables, lambda table, index: open_image(table, index, self.data.image))

    @cached_property
    def _tables(self) -> dict[str, Table]:
        keys = self.data
        tables = _digits() if keys.path == DIGITS else read(keys.path, images=[keys.image])
        need_columns(tables, keys.image, keys.label)
        return tables

    @cached_property
    def classes(self) -> list[int]:
        """The labels to tell apart; every label of the data must be a class that the data know of."""
        keys = self.data
        names = getattr(next(iter(self._tables.values())).rows.features[keys.label], "names", None)
        present = set()
        for table in self._tables.values():
            for index, label in enumerate(table.rows[keys.label]):
                if not isinstance(label, int) or label < 0 or (names and label >= len(names)):
                    accepted = f"0 to {len(names) - 1}" if names else "a whole number from 0"
                    raise ValueError(f"{table.name(index)}: {keys.label}={label!r}; expected {accepted}")
                present.add(label)
        if strange := set(keys.classes) - present:
            raise ValueError(f"task.data.classes={keys.classes}: {keys.path} has no class {min(strange)}")
        return list(keys.classes) or list(range(len(names) if names else max(present) + 1))

    def build(self) -> Any:
        return self.model.load("AutoModelForImageClassification", HEADS, num_labels=len(self.classes))

    def head(self, model: Any) -> list[str]:
        timm = getattr(model, "timm_model", None)
        return super().head(model) if timm is None else [f"timm_model.{timm.default_cfg['classifier']}"]

    def metrics(self, prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@dataclass
class LabelledImages:
    """A table's pictures as tensors, and their labels as indices of ``classes``."""

    table: Table
    keys: Images
    classes: list[int]
    augment: bool

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.table.rows[index][self.keys.label]
        return {"pixel_values": self.shown(open_image(self.table, index, self.keys.image)), "labels": self._of[label]}

    @cached_property
    def _of(self) -> dict[int, int]:
        return {label: index for index, label in enumerate(self.classes)}

    @cached_property
    def shown(self) -> Callable[[Any], Tensor]:
        """What turns a Pillow image into the model's input (channels, height, width)."""
        import torch
        from PIL import ImageOps
        from torchvision.transforms import v2

        keys = self.keys
        mode = "L" if len(keys.mean) == 1 else "RGB"
        steps = [v2.Lambda(lambda picture: picture.convert(mode))]
        if keys.rotate:
            steps.append(v2.Lambda(lambda picture: picture.rotate(keys.rotate, expand=True)))
        if keys.invert:
            steps.append(v2.Lambda(ImageOps.invert))
        if self.augment and keys.size:
            steps += [v2.RandomResizedCrop(keys.size), v2.RandomHorizontalFlip()]
        elif keys.size:
            steps += [v2.Resize(keys.size), v2.CenterCrop(keys.size)]
        elif self.augment:
            steps += [v2.Lambda(lambda picture: v2.RandomCrop(picture.size[::-1], padding=4)(picture))]
            steps += [v2.RandomHorizontalFlip()]
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(keys.mean, keys.std)]
        return v2.Compose(steps)


def _with(table: Table, column: str, classes: list[int]) -> Table:
    wanted = set(classes)
    return table.select(index for index, label in enumerate(table.rows[column]) if label in wanted)


def _digits() -> dict[str, Table]:
    """scikit-learn's 1797 handwritten digits of 8 × 8 pixels, as one split."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).round().astype("uint8")) for image in digits.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    rows = datasets.Dataset.from_dict({"image": pictures, "label": digits.target.tolist()}, features=features)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return {"train": Table(rows, lambda index: f"{DIGITS}, row {index}")}
