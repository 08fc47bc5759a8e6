"""A batch normalisation that trains on one value per channel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Uses its running statistics if a batch has one value per channel: UperNet pools an image to one pixel, and the
    last batch of an epoch may have one image. Takes parameters that an engine has cast to half precision, which casts
    no statistics."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if mean is None or variance is None or self.momentum is None:
            return super().forward(x)
        many = self.training and x.numel() > x.shape[1]
        if many and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if weight is not None:
            weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        return F.batch_norm(x, mean, variance, weight, bias, many, self.momentum, self.eps)
