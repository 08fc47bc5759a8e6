"""Merging into a quantized weight: dequantize, add, and quantize anew. That rounds, and a warning says by how much."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flora.layers.weights.offload import is_offloaded
from flora.layers.weights.storage import dense_before, dense_of, kept_state, pack, put_back, storage_of

if TYPE_CHECKING:
    from flora.tuner.adapted_weight import AdaptedWeight
    from flora.tuner.merging import MergeableWeight


def frozen(layer: AdaptedWeight) -> Tensor:
    """The dense weight without any update, even while updates are merged into it."""
    base, name = layer.get_base_layer(), layer.parameter_name
    return dense_before(base, name, layer._kept[0]) if layer._kept else dense_of(base, name)


def numbers(layer: AdaptedWeight) -> Tensor:
    """The dense weight as it is, in numbers wide enough to add to."""
    return dense_of(layer.get_base_layer(), layer.parameter_name).float()


def check_mergeable(layer: AdaptedWeight) -> None:
    """Raise ValueError for a weight that can't be quantized anew."""
    storage = storage_of(layer.get_base_layer(), layer.parameter_name)
    if storage is not None and storage.pack is None:
        raise ValueError(
            f"layer {layer.name!r}: its weight of shape {list(layer.weight_shape)} is kept as {storage.name}, which "
            "can't be made anew here, so no update can be merged into it; leave the adapter beside it"
        )
    if is_offloaded(layer.get_base_layer()):
        raise ValueError(
            f"layer {layer.name!r}: its quantized weight of shape {list(layer.weight_shape)} is offloaded; merge in a "
            "model that is loaded without offloading"
        )


@torch.no_grad()
def merge(layer: MergeableWeight, names: Sequence[str], keep: bool) -> None:
    """As ``MergeableWeight.merge_checked``, for adapters that are not merged."""
    base, name = layer.get_base_layer(), layer.parameter_name
    before, weight, merged = kept_state(base, name), numbers(layer), layer._merged_weight(names)
    pack(base, name, merged)
    loss, update = numbers(layer) - merged, merged - weight
    layer.merge_loss = tuple(tensor.square().sum().item() for tensor in (loss, update, merged))
    if keep and not layer._kept:
        layer._kept.append(before)
    layer.merged_adapters.extend(names)


def unmerge(layer: AdaptedWeight, kept: dict[str, Any]) -> None:
    """Put back what was there before the first merge, to the bit."""
    put_back(layer.get_base_layer(), layer.parameter_name, kept)


def warn_of_loss(layers: Sequence[AdaptedWeight]) -> None:
    """One warning with what quantized weights have lost in merges since the last call."""
    losses = [layer.merge_loss for layer in layers if layer.merge_loss]
    for layer in layers:
        layer.merge_loss = ()
    if losses:
        loss, update, merged = (math.sqrt(math.fsum(part)) for part in zip(*losses, strict=True))
        share = f"{100 * loss / update:.2g} % of the update and " if update else ""
        warnings.warn(
            f"merging has quantized {len(losses)} weights anew: they are off by {share}{100 * loss / merged:.2g} % of "
            "the merged weights (root mean square)",
            stacklevel=3,
        )
