"""Image classification: any image classifier of transformers (including timm's), on pictures from any source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import HEADS, Task
from flora_lab.tasks.data.pictures import DIGITS, Pictures, open_image, read
from flora_lab.tasks.data.records import Records, check_each, need_columns, need_known, source_of, three
from flora_lab.tasks.models.pretrained import Pretrained, redraw

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = (*HEADS, "dist_head")  # the second of SwiftFormer's


@dataclass
class Images(Pictures):
    """Where the pictures come from, and how they are transformed."""

    path: str = field(
        default=DIGITS,
        metadata={"help": "digits (scikit-learn's), a folder, a parquet file, or a name on the hub", "path": True},
    )
    image: str = field(default="image", metadata={"help": "column of the pictures"})
    label: str = field(default="label", metadata={"help": "column of the classes; test is not used without it"})
    classes: list[int] = field(default_factory=list, metadata={"help": "the classes to use; default: all"})
    rotate: int = field(default=0, metadata={"help": "degrees, counter-clockwise", "choices": (0, 90, 180, 270)})
    invert: bool = field(default=False, metadata={"help": "swap dark and light"})
    size: int | None = field(
        default=None, metadata={"help": "pixels: scale the shorter side to it, and crop", "least": 1}
    )
    augment: bool = field(default=False, metadata={"help": "random crops and mirroring for train"})

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"task.data.classes={self.classes}: expected two or more different classes, or none")


@dataclass
class ImageClassification(Task):
    name: str = field(default="image_classification", metadata={"help": "the task"})
    model: Pretrained = field(default_factory=Pretrained)
    data: Images = field(default_factory=Images)
    source: Images | None = field(default=None, metadata={"help": "data that the base model is trained on first"})

    metric = "accuracy"

    def source_task(self) -> ImageClassification | None:
        return self.source and replace(self, data=self.source, source=None)

    def splits(self, seed: int) -> dict[str, LabelledImages]:
        keys = self.data
        kept = {name: _with(records, keys.label, self.classes) for name, records in self._records.items()}
        splits = three(kept, keys, seed, keys.path)
        names = dict(enumerate(self.names))
        need_known(splits, keys.label, lambda label: f"class {names.get(label, label)!r}")
        return {
            name: LabelledImages(records, keys, self.classes, keys.augment and name == "train")
            for name, records in splits.items()
        }

    def check(self, splits: dict[str, LabelledImages]) -> None:
        keys, train = self.data, splits["train"].records
        first = open_image(train, 0, keys.image).size

        def look(records: Records, index: int) -> None:
            size = open_image(records, index, keys.image, len(keys.mean)).size
            if size != first and keys.size is None:
                sizes = f"{size[0]} × {size[1]}, and {train.name(0)} {first[0]} × {first[1]}"
                raise ValueError(f"{records.name(index)} is {sizes}; set task.data.size")

        check_each((examples.records for examples in splits.values()), look)

    @cached_property
    def _records(self) -> dict[str, Records]:
        keys = self.data
        splits = read(keys.path, images=[keys.image])
        need_columns(splits, keys.image, keys.label)
        return {
            split: records for split, records in splits.items() if split != "test" or _labelled(records, keys.label)
        }

    @cached_property
    def names(self) -> list[str]:
        """The source's names of its classes, or []. Raises ValueError if its splits have different ones."""
        label = self.data.label
        given = [
            (source_of(records, split), records.dataset.features[label].names)
            for split, records in self._records.items()
            if hasattr(records.dataset.features[label], "names")
        ]
        for (source, names), (other, others) in pairwise(given):
            for place, (name, differing) in enumerate(zip_longest(names, others)):
                if name != differing:
                    raise ValueError(f"{other}: class {place} is {differing!r}, but {name!r} in {source}")
        return given[0][1] if given else []

    @cached_property
    def classes(self) -> list[int]:
        """The labels to use. Raises ValueError if a record's label is not a class of the data."""
        keys, names, present = self.data, self.names, set()
        for records in self._records.values():
            for index, label in enumerate(records.dataset[keys.label]):
                if not isinstance(label, int) or label < 0 or (names and label >= len(names)):
                    accepted = f"0 to {len(names) - 1}" if names else "a whole number from 0"
                    raise ValueError(f"{records.name(index)}: {keys.label}={label!r}; expected {accepted}")
                present.add(label)
        if missing := set(keys.classes) - present:
            raise ValueError(f"task.data.classes={keys.classes}: {keys.path} has no class {min(missing)}")
        classes = list(keys.classes) or list(range(len(names) or max(present, default=0) + 1))
        if len(classes) < 2:
            raise ValueError(f"{keys.path} has one class only; expected two or more")
        return classes

    def build(self) -> Any:
        # no architectures: a checkpoint of DeiT or LeViT may name one for distillation, which takes no labels
        kind, size = "AutoModelForImageClassification", len(self.classes)
        model = self.model.load(kind, OUTPUTS, num_labels=size, architectures=[])
        if self.model.name and hasattr(model, "timm_model"):
            redraw(model, tuple(self.head(model)))  # timm's head is deeper in the model than transformers'
        return model

    def head(self, model: Any) -> list[str]:
        timm = getattr(model, "timm_model", None)
        if timm is not None:
            return [f"timm_model.{timm.default_cfg['classifier']}"]
        names = [name for name, part in model.named_children() if name in OUTPUTS and list(part.parameters())]
        if not names:
            raise self.model.fault(f"{type(model).__name__} has no output layer named {', '.join(OUTPUTS)}")
        return names

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Accuracy; NaN if a score is not finite, since the model diverged."""
        import numpy as np

        scores, labels = prediction.predictions, prediction.label_ids
        return {"accuracy": float((scores.argmax(-1) == labels).mean()) if np.isfinite(scores).all() else np.nan}


@dataclass
class LabelledImages:
    """Pictures as tensors, and their labels as indices of ``classes``."""

    records: Records
    keys: Images
    classes: list[int]
    augment: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = open_image(self.records, index, self.keys.image, len(self.keys.mean))
        label = self.records.dataset[index][self.keys.label]
        return {"pixel_values": self.transform(picture), "labels": self._of[label]}

    @cached_property
    def _of(self) -> dict[int, int]:
        return {label: index for index, label in enumerate(self.classes)}

    @cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """Turns a Pillow image of 8-bit channels into the model's input (channels, height, width)."""
        import torch
        from PIL import ImageOps
        from torchvision.transforms import v2

        keys = self.keys
        steps: list[Callable[[Any], Any]] = []
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


def _labelled(records: Records, column: str) -> bool:
    """Whether it is empty or has labels: a competition's test split has none, or -1 for each picture."""
    return not len(records) or any(label not in (None, -1) for label in records.dataset[column])


def _with(records: Records, column: str, classes: list[int]) -> Records:
    wanted = set(classes)
    return records.select(index for index, label in enumerate(records.dataset[column]) if label in wanted)
