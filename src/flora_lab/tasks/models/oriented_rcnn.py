"""oriented-det's Oriented R-CNN (Xie et al. 2021) over any backbone, with a forward for transformers' Trainer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # it still uses torch.jit.script
    from oriented_det.models.oriented_rcnn import OrientedRCNN
    from oriented_det.models.oriented_roi import OrientedROIHead
    from oriented_det.models.utils import rboxes_to_tensor
    from oriented_det.ops.rotated_ops import rotated_nms

if TYPE_CHECKING:
    from flora_lab.tasks.oriented_detection import RotatedDetector

__all__ = ["OrientedDetector", "rotated_nms"]


class _Maps(nn.Module):
    """What the package takes for the backbone: the maps were made before, under the trainer's precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels, self.maps = width, None

    def forward(self, images: Tensor) -> dict[str, Tensor] | None:
        return self.maps


class OrientedDetector(nn.Module):
    """``body``: a transformers backbone. ``classes``: their number, without the background, which is class 0.

    The thresholds are MMRotate's for DOTA, as in oriented-det's own configuration.
    """

    def __init__(self, body: nn.Module, classes: int, keys: RotatedDetector) -> None:
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        self.body, self.fpn = body, FeaturePyramidNetwork(body.channels, keys.channels, LastLevelMaxPool())
        self.detections = keys.detections
        self.rcnn = OrientedRCNN(
            classes,
            backbone=_Maps(keys.channels),
            anchor_scales=[float(keys.anchor)],
            anchor_ratios=[0.5, 1.0, 2.0],
            rpn_pre_nms_top_n=keys.proposals,
            rpn_post_nms_top_n=keys.proposals,
            rpn_nms_threshold=0.8,
            rpn_positive_iou_threshold=0.7,
            rpn_negative_iou_threshold=0.3,
            use_hbb_for_matching=True,
            roi_batch_size_per_image=keys.samples,
            roi_positive_iou_threshold=0.5,
            roi_negative_iou_threshold=0.5,
            target_stds=(0.1, 0.1, 0.2, 0.2, 0.1),
            max_detections_per_image=keys.detections,
            inference_pre_nms_score_threshold=0.05,
            final_nms_iou_threshold=keys.overlap,
            final_nms_use_cpu=True,  # exact: the other way samples points
        )
        self.rcnn.roi_head = OrientedROIHead(keys.channels * 7**2, classes, keys.hidden, class_agnostic_regression=True)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses in training, detections in evaluation.

        ``pixel_values`` (batch, 3, side, side), normalised; ``labels`` (batch,), the tiles' numbers. In training also
        ``boxes`` (batch, n, 5), rectangles as in ``dota``, and ``classes`` (batch, n) from 1; 0 for no object, -1 for
        one that is neither object nor background.

        Returns {"loss"} in training. In evaluation, with d = detections: "boxes" (batch, d, 5), "scores" (batch, d) in
        descending order, padded with 0, "classes" (batch, d). With ``labels``, "loss" comes first; it is NaN, since the
        detector has no loss in evaluation.
        """
        self.rcnn.backbone.maps = maps = self.maps(pixel_values)
        self.rcnn.fpn_strides = [round(pixel_values.shape[-1] / x.shape[-1]) for x in maps.values()]
        images = list(pixel_values.float())
        try:
            with torch.autocast(pixel_values.device.type, enabled=False):  # boxes need more digits than bf16 has
                if self.training:
                    losses = self.rcnn(images, [self._target(*one) for one in zip(boxes, classes, strict=True)])
                    return {"loss": sum(value for name, value in losses.items() if name.startswith("loss"))}
                packed = [self._pack(one, pixel_values) for one in self.rcnn(images)]
        finally:
            self.rcnn.backbone.maps = None
        stacked = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
        return stacked if labels is None else {"loss": pixel_values.new_tensor(float("nan")), **stacked}

    def maps(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The feature pyramid, by level, in float32."""
        maps = self.body(pixel_values).feature_maps
        return {level: x.float() for level, x in self.fpn({str(n): x for n, x in enumerate(maps)}).items()}

    def objectness(self, pixel_values: Tensor) -> Tensor:
        """The first stage's logits at every anchor, flattened."""
        logits, _ = self.rcnn.rpn_head(list(self.maps(pixel_values).values()))
        return torch.cat([x.flatten() for x in logits])

    @staticmethod
    def _target(boxes: Tensor, classes: Tensor) -> dict[str, Tensor]:
        boxes, there = boxes.float(), classes > 0
        return {"rboxes": boxes[there], "labels": classes[there], "rboxes_ignore": boxes[classes < 0]}

    def _pack(self, detected: dict, like: Tensor) -> dict[str, Tensor]:
        """A tile's detections, padded to ``detections``."""
        packed = {
            "boxes": like.new_zeros(self.detections, 5, dtype=torch.float32),
            "scores": like.new_zeros(self.detections, dtype=torch.float32),
            "classes": torch.zeros(self.detections, dtype=torch.long, device=like.device),
        }
        count = len(detected["rboxes"])
        if count:
            packed["boxes"][:count] = rboxes_to_tensor(detected["rboxes"], device=like.device)
            packed["scores"][:count], packed["classes"][:count] = detected["scores"], detected["labels"]
        return packed
