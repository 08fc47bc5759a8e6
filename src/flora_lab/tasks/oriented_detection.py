"""Oriented detection: Oriented R-CNN over any backbone, tiles of data in DOTA's format, DOTA's Task-1 precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flora_lab.tasks.base import Task
from flora_lab.tasks.data import dota
from flora_lab.tasks.data.pictures import Pictures, of_files, open_image
from flora_lab.tasks.data.records import SPLITS, Records, check_each, padded, three
from flora_lab.tasks.models.backbone import load_backbone, map_layers
from flora_lab.tasks.models.pretrained import Pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class AerialImages(Pictures):
    """Where the pictures and their boxes come from, and how they are cut."""

    few: ClassVar[str] = ", or set task.data.overfit=true, which evaluates on the train split"

    path: str = field(
        default="data",
        metadata={"help": "folder with train/ and val/, or all in one, each with images/ and labelTxt/", "path": True},
    )
    classes: list[str] = field(default_factory=list, metadata={"help": "names of the classes; default: all there are"})
    ignore: list[str] = field(default_factory=list, metadata={"help": "classes to leave out"})
    drop_bad: bool = field(
        default=False,
        metadata={"help": "leave out objects that have no area, are not convex or outside; else they are errors"},
    )
    tile: int = field(
        default=1024, metadata={"help": "side in pixels of the squares that pictures are cut into", "least": 32}
    )
    overlap: int = field(default=200, metadata={"help": "pixels that neighbours share", "least": 0})
    share: float = field(
        default=0.7,
        metadata={
            "help": "a tile has an object if it has this share of its area; with less it is not background either"
        },
    )
    augment: bool = field(default=False, metadata={"help": "random mirroring for train, in both directions"})
    show: int = field(default=2, metadata={"help": "tiles of the test split to draw for the report", "least": 0})
    overfit: bool = field(
        default=False, metadata={"help": "evaluate on the train split: to see that a model can learn it"}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.mean) != 3:
            raise ValueError(f"task.data.mean={self.mean}: expected three numbers")
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"task.data.overlap={self.overlap}: expected less than task.data.tile={self.tile}")
        if not 0 < self.share <= 1:
            raise ValueError(f"task.data.share={self.share}: expected a share above 0")


@dataclass
class RotatedDetector:
    """Sizes; the defaults are MMRotate's for DOTA."""

    channels: int = field(default=256, metadata={"help": "width of the feature pyramid", "least": 1})
    hidden: int = field(default=1024, metadata={"help": "width of the box head", "least": 1})
    anchor: int = field(default=8, metadata={"help": "side of an anchor, in pixels of its map", "least": 1})
    proposals: int = field(default=2000, metadata={"help": "boxes per tile for the second stage", "least": 1})
    samples: int = field(default=512, metadata={"help": "boxes per tile that train the second stage", "least": 1})
    detections: int = field(default=2000, metadata={"help": "detections per tile, at most", "least": 1})
    overlap: float = field(default=0.1, metadata={"help": "IoU above which the better of two detections stays"})

    def __post_init__(self):
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"task.detector.overlap={self.overlap}: expected an IoU from 0 to 1")


@dataclass
class OrientedDetection(Task):
    name: str = field(default="oriented_detection", metadata={"help": "the task"})
    backbone: Pretrained = field(default_factory=Pretrained)
    detector: RotatedDetector = field(default_factory=RotatedDetector)
    data: AerialImages = field(default_factory=AerialImages)

    metric = "mAP"

    def splits(self, seed: int) -> dict[str, TileExamples]:
        _need_package()
        images = self.source.images
        own = {split: _records(images, places) for split, places in self.source.splits.items()}
        if self.data.overfit:
            own = dict.fromkeys(SPLITS, own["train"]) if "train" in own else own
        splits = three(own, self.data, seed, self.data.path)
        self._need_objects(splits)
        return {name: TileExamples(records, self, name == "train") for name, records in splits.items()}

    def _need_objects(self, splits: dict[str, Records]) -> None:
        """Raise ValueError, naming the split or the line, if a split has nothing to learn or to evaluate, or a class
        that train lacks."""
        of = {
            name: [self.source.images[place] for place in records.dataset["place"][:]]
            for name, records in splits.items()
        }
        known = {number for image in of["train"] for number in image.classes}
        for name, images in of.items():
            if not any(name == "train" or not difficult for image in images for difficult in image.difficult):
                use = "learn from" if name == "train" else "evaluate"
                raise ValueError(f"{self.data.path}: the {name} split has no object to {use}")
            for image in images:
                for row, number in zip(image.rows, image.classes, strict=True):
                    if number not in known:
                        raise ValueError(f"{row}: class {self.source.classes[number - 1]!r} is not in the train split")

    def check(self, splits: dict[str, TileExamples]) -> None:
        check_each((examples.records for examples in splits.values()), self._check)

    def _check(self, records: Records, index: int) -> None:
        picture, image = open_image(records, index, "image", 3), self.source.images[records[index]["place"]]
        if picture.size != (image.width, image.height):  # EXIF that comes after a PNG's pixels
            sizes = f"{image.width} × {image.height}, and {picture.width} × {picture.height} once it is upright"
            raise ValueError(f"{image.name} is {sizes}; save it anew")

    @cached_property
    def source(self) -> dota.Source:
        keys = self.data
        return dota.read(Path(keys.path), keys.classes, keys.ignore, keys.drop_bad)

    @cached_property
    def tiles(self) -> list[dota.Tile]:
        """Of all pictures, by number."""
        keys, images = self.data, self.source.images
        return [
            tile for place, image in enumerate(images) for tile in dota.tiles_of(place, image, keys.tile, keys.overlap)
        ]

    def build(self) -> nn.Module:
        _need_package()
        from flora_lab.tasks.models.oriented_rcnn import OrientedDetector

        return OrientedDetector(load_backbone(self.backbone), len(self.source.classes), self.detector)

    def head(self, model: nn.Module) -> list[str]:
        """All except the backbone; of that, what it applies to its maps only."""
        return ["fpn", "rcnn.rpn_head", "rcnn.roi_head", *map_layers(model)]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors padded with 0 to the most objects."""
        return padded(examples)

    def outputs(self, model: nn.Module, examples: Sequence[dict[str, Any]]) -> Tensor:
        """The first stage's logits: the detections do not depend smoothly on the weights."""
        import torch

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.objectness(torch.stack([example["pixel_values"] for example in examples]))

    def metrics(self, prediction: Any) -> dict[str, float]:
        """DOTA's Task-1 precisions of whole pictures: "mAP", "AP50", "AP75" (``dota_precision.precisions``)."""
        from flora_lab.tasks.evaluation.dota_precision import precisions

        found = self.detections(prediction.label_ids.tolist(), *prediction.predictions)
        return precisions([self.truth(place) for place in found], list(found.values()))

    def judge(
        self, model: nn.Module, base: Callable[[], nn.Module], splits: dict[str, Any], folder: Path
    ) -> dict[str, Any]:
        """Tiles of the test split with their boxes, for the report and as PNG in ``folder``."""
        from flora_lab.tasks.evaluation.oriented_pictures import samples

        count = self.data.show
        return {"samples": samples(self, model, splits["test"], folder / "boxes", count)} if count else {}

    def truth(self, place: int) -> Any:
        """The objects of a picture (``dota_precision.Boxes``)."""
        import numpy as np

        from flora_lab.tasks.evaluation.dota_precision import Boxes

        image = self.source.images[place]
        quads = np.array(image.quads, dtype="float64").reshape(-1, 4, 2)
        return Boxes(quads, np.array(image.classes, dtype=int), difficult=np.array(image.difficult, dtype=bool))

    def detections(self, numbers: Sequence[int], boxes: Any, scores: Any, classes: Any) -> dict[int, Any]:
        """The boxes found in each picture, by its place, from those of its tiles (``OrientedDetector.forward``)."""
        import numpy as np

        from flora_lab.tasks.evaluation.dota_precision import joined

        parts: dict[int, list[tuple[Any, Any, Any]]] = {}
        for number, box, score, kind in zip(numbers, boxes, scores, classes, strict=True):
            tile, there = self.tiles[number], score > 0
            moved = box[there].astype("float64") + np.array([tile.left, tile.top, 0, 0, 0])
            parts.setdefault(tile.place, []).append((moved, kind[there], score[there]))
        joins = {place: map(np.concatenate, zip(*of, strict=True)) for place, of in parts.items()}
        return {place: joined(*arrays, self.detector.overlap) for place, arrays in joins.items()}


class TileExamples:
    """Tiles (3, side, side) of a split's pictures, normalised and padded with 0; for train also their objects.

    Tiles without an object are not trained on.
    """

    def __init__(self, records: Records, task: OrientedDetection, train: bool) -> None:
        self.records, self.task, self.train = records, task, train
        place_of = {place: index for index, place in enumerate(records.dataset["place"][:])}
        numbered = [(number, place_of[tile.place]) for number, tile in enumerate(task.tiles) if tile.place in place_of]
        self.tiles = [pair for pair in numbered if not train or (self._objects(pair[0])[1] > 0).any()]
        if not self.tiles:
            raise ValueError(
                f"{task.data.path}: no tile has {task.data.share:.0%} of an object; task.data.tile is too small"
            )

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch
        from torchvision.transforms.v2 import functional as V

        number, record = self.tiles[index]
        keys, tile = self.task.data, self.task.tiles[number]
        picture = open_image(self.records, record, "image", 3)
        size = min(keys.tile, picture.width - tile.left), min(keys.tile, picture.height - tile.top)
        cut = picture.crop((tile.left, tile.top, tile.left + size[0], tile.top + size[1]))
        pixels = V.normalize(V.to_dtype(V.to_image(cut), torch.float32, scale=True), keys.mean, keys.std)
        pixels = V.pad(pixels, [0, 0, keys.tile - size[0], keys.tile - size[1]])
        example = {"pixel_values": torch.as_tensor(pixels), "labels": number}
        if self.train:
            quads, classes = self._objects(number)
            for axis in (0, 1) if keys.augment else ():
                if torch.rand(()) < 0.5:
                    example["pixel_values"] = example["pixel_values"].flip(2 - axis)
                    quads[..., axis] = keys.tile - quads[..., axis]
            example |= {"boxes": torch.as_tensor(dota.rectangles(quads)).float(), "classes": torch.as_tensor(classes)}
        return example

    def objects(self, index: int) -> tuple[Any, Any]:
        return self._objects(self.tiles[index][0])

    def _objects(self, number: int) -> tuple[Any, Any]:
        """Corners (n, 4, 2) in a tile's pixels, and classes (n,): -1 for an object of which the tile has too little."""
        import numpy as np

        tile, keys = self.task.tiles[number], self.task.data
        image = self.task.source.images[tile.place]
        quads = np.array(image.quads, dtype="float64").reshape(-1, 4, 2) - [tile.left, tile.top]
        shares = dota.shares(quads, keys.tile) if len(quads) else np.zeros(0)
        there = shares > 0
        classes = np.where(shares >= keys.share, np.array(image.classes, dtype=int), -1)
        return quads[there], classes[there]


def _records(images: list[dota.AerialImage], places: range) -> Records:
    return of_files([images[place].file for place in places], [images[place].name for place in places], list(places))


def _need_package() -> None:
    """Raise ValueError if oriented-det is not installed."""
    from importlib.util import find_spec

    for package in ("oriented_det", "shapely"):
        if not find_spec(package):
            raise ValueError(f"{package} is not installed: pip install 'flora-peft[oriented]'")
