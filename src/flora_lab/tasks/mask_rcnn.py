"""torchvision's Mask R-CNN (He et al. 2017) over any backbone, with a forward that transformers' Trainer can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Detector:
    """The sizes of its parts; the defaults are He et al.'s, for COCO."""

    channels: int = field(default=256, metadata={"help": "of the feature pyramid and the mask head", "least": 1})
    hidden: int = field(default=1024, metadata={"help": "width of the box head", "least": 1})
    anchors: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256, 512],
        metadata={"help": "sides in pixels, one for each map of the backbone; one more adds a coarser map"},
    )
    size: list[int] = field(
        default_factory=lambda: [800],
        metadata={"help": "an image's shorter side in pixels; of several, train draws one and the rest uses the last"},
    )
    longest: int = field(default=1333, metadata={"help": "an image's longer side, at the most", "least": 1})
    proposals: int = field(default=1000, metadata={"help": "boxes of an image that go to the second stage", "least": 1})
    samples: int = field(default=512, metadata={"help": "of them, to train on", "least": 1})
    detections: int = field(default=100, metadata={"help": "of an image, at the most", "least": 1})

    def __post_init__(self):
        for name in ("anchors", "size"):
            given = getattr(self, name)
            if not given or min(given) < 1:
                raise ValueError(f"task.detector.{name}={given}: expected one or more numbers from 1")


class MaskRCNN(nn.Module):
    """``body``: a transformers backbone; ``classes``: without the background, which is class 0."""

    def __init__(self, body: nn.Module, classes: int, keys: Detector, mean: Sequence[float], std: Sequence[float]):
        from torchvision.models.detection import faster_rcnn, mask_rcnn, rpn
        from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        levels, width = len(body.channels), keys.channels
        if len(keys.anchors) not in (levels, levels + 1):
            raise ValueError(
                f"task.detector.anchors={keys.anchors}: expected {levels} sides for the backbone's maps, or one more"
            )
        coarser = LastLevelMaxPool() if len(keys.anchors) > levels else None
        names = [str(level) for level in range(levels)]
        whole = mask_rcnn.MaskRCNN(
            SimpleNamespace(out_channels=width),  # the body and its pyramid are run here
            min_size=tuple(keys.size),
            max_size=keys.longest,
            image_mean=list(mean),
            image_std=list(std),
            rpn_anchor_generator=rpn.AnchorGenerator(
                [[side] for side in keys.anchors], [[0.5, 1.0, 2.0]] * len(keys.anchors)
            ),
            rpn_pre_nms_top_n_train=2 * keys.proposals,
            rpn_pre_nms_top_n_test=keys.proposals,
            rpn_post_nms_top_n_train=keys.proposals,
            rpn_post_nms_top_n_test=keys.proposals,
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            box_head=faster_rcnn.TwoMLPHead(width * 7**2, keys.hidden),
            box_predictor=faster_rcnn.FastRCNNPredictor(keys.hidden, classes + 1),
            box_batch_size_per_image=keys.samples,
            box_detections_per_img=keys.detections,
            mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            mask_head=mask_rcnn.MaskRCNNHeads(width, [width] * 4, 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, classes + 1),
        )
        self.body, self.fpn = body, FeaturePyramidNetwork(body.channels, width, coarser)
        self.transform, self.rpn, self.roi_heads = whole.transform, whole.rpn, whole.roi_heads
        self.detections = keys.detections

    def forward(
        self,
        pixel_values: Tensor,
        sizes: Tensor,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        classes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses in training, detections in evaluation.

        ``pixel_values`` (batch, 3, height, width) from 0 to 1, padded below and on the right; ``sizes`` (batch, 2), the
        images' own height and width; ``labels`` (batch,), which images they are. In training ``boxes`` (batch, n, 4) of
        left, top, right, bottom in pixels, ``classes`` (batch, n) from 1, and 0 where there is no object, and ``masks``
        (batch, n, height, width).

        Returns {"loss"} in training. In evaluation, with d = detections: "boxes" (batch, d, 4), "scores" (batch, d),
        from high to low and 0 where there are no more, "classes" (batch, d), "masks" (batch, d, 28, 28), the object's
        probability in its box, and before them a "loss" that is not a number, as Mask R-CNN has none there.
        """
        spaces = [tuple(size) for size in sizes.tolist()]
        images = [image[:, :height, :width] for image, (height, width) in zip(pixel_values, spaces, strict=True)]
        targets = None
        if self.training:
            there = classes > 0
            targets = [
                {
                    "boxes": boxes[i, there[i]],
                    "labels": classes[i, there[i]],
                    "masks": masks[i, there[i], :height, :width],
                }
                for i, (height, width) in enumerate(spaces)
            ]
        shown, targets = self.transform(images, targets)
        maps = self.maps(shown.tensors)
        proposals, first = self.rpn(shown, maps, targets)
        found, second = self.roi_heads(maps, proposals, shown.image_sizes, targets)
        if self.training:
            return {"loss": sum({**first, **second}.values())}
        packed = [self._packed(*pair) for pair in zip(found, zip(shown.image_sizes, spaces, strict=True), strict=True)]
        stacked = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
        return stacked if labels is None else {"loss": pixel_values.new_tensor(float("nan")), **stacked}

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images).feature_maps
        return self.fpn({str(level): x for level, x in enumerate(maps)})

    def objectness(self, pixel_values: Tensor) -> Tensor:
        """The first stage's logits at every anchor of images of one size, flat."""
        shown, _ = self.transform(list(pixel_values))
        logits, _ = self.rpn.head(list(self.maps(shown.tensors).values()))
        return torch.cat([x.flatten() for x in logits])

    def _packed(self, found: dict[str, Tensor], spaces: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, Tensor]:
        """An image's detections as tensors of one length; boxes from the scaled image's pixels to its own."""
        from torchvision.models.detection.transform import resize_boxes

        missing = self.detections - len(found["scores"])
        return {
            "boxes": F.pad(resize_boxes(found["boxes"].float(), *spaces), (0, 0, 0, missing)),
            "scores": F.pad(found["scores"].float(), (0, missing)),
            "classes": F.pad(found["labels"], (0, missing)),
            "masks": F.pad(found["masks"][:, 0].float(), (0, 0, 0, 0, 0, missing)),
        }
