"""torchvision's Mask R-CNN (He et al. 2017) over any backbone, with a forward for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from flora_lab.tasks.instance_segmentation import Detector


class MaskRCNN(nn.Module):
    """``body``: a transformers backbone. ``classes``: their number, without the background, which is class 0."""

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
            SimpleNamespace(out_channels=width),  # forward runs the backbone and the pyramid itself
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
        images' own height and width; ``labels`` (batch,), their places. In training also ``boxes`` (batch, n, 4) of
        left, top, right, bottom in pixels, ``classes`` (batch, n) from 1, or 0 for no object, and ``masks`` (batch, n,
        height, width).

        Returns {"loss"} in training. In evaluation, with d = detections: "boxes" (batch, d, 4), "scores" (batch, d) in
        descending order, padded with 0, "classes" (batch, d), "masks" (batch, d, 28, 28), the object's probability in
        its box. With ``labels``, "loss" comes first; it is NaN, since Mask R-CNN has no loss in evaluation.
        """
        spaces = [tuple(size) for size in sizes.tolist()]
        images = [image[:, :height, :width] for image, (height, width) in zip(pixel_values, spaces, strict=True)]
        targets = None
        if self.training:
            present = classes > 0
            targets = [
                {
                    "boxes": boxes[i, present[i]],
                    "labels": classes[i, present[i]],
                    "masks": masks[i, present[i], :height, :width],
                }
                for i, (height, width) in enumerate(spaces)
            ]
        scaled, targets = self.transform(images, targets)
        maps = self.maps(scaled.tensors)
        proposals, first = self.rpn(scaled, maps, targets)
        detected, second = self.roi_heads(maps, proposals, scaled.image_sizes, targets)
        if self.training:
            return {"loss": sum({**first, **second}.values())}
        sizes_of = zip(scaled.image_sizes, spaces, strict=True)
        packed = [self._pack(one, *sizes) for one, sizes in zip(detected, sizes_of, strict=True)]
        stacked = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
        return stacked if labels is None else {"loss": pixel_values.new_tensor(float("nan")), **stacked}

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The feature pyramid, by level."""
        maps = self.body(images).feature_maps
        return self.fpn({str(level): x for level, x in enumerate(maps)})

    def objectness(self, pixel_values: Tensor) -> Tensor:
        """The first stage's logits at every anchor, flattened; for images of one size."""
        scaled, _ = self.transform(list(pixel_values))
        logits, _ = self.rpn.head(list(self.maps(scaled.tensors).values()))
        return torch.cat([x.flatten() for x in logits])

    def _pack(self, detected: dict[str, Tensor], scaled: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
        """An image's detections, padded to ``detections``; the boxes in pixels of the image, not of the scaled one."""
        from torchvision.models.detection.transform import resize_boxes

        missing = self.detections - len(detected["scores"])
        return {
            "boxes": F.pad(resize_boxes(detected["boxes"].float(), scaled, size), (0, 0, 0, missing)),
            "scores": F.pad(detected["scores"].float(), (0, missing)),
            "classes": F.pad(detected["labels"], (0, missing)),
            "masks": F.pad(detected["masks"][:, 0].float(), (0, 0, 0, 0, 0, missing)),
        }
