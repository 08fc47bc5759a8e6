"""The samples in a layer's arguments: how many there are, and the mode that counts them.

Each function takes a layer and what its ``forward`` takes. It returns None for a single sample without a mode of its
own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def batch_mode(layer: nn.Module) -> int:
    """The mode of the layer's input that counts samples."""
    return 0 if getattr(layer, "batch_first", True) else 1


def rows(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """Of a layer that takes features last, or indices."""
    single = x.ndim == 0 or (x.ndim == 1 and x.is_floating_point())
    return None if single else x.shape[batch_mode(layer)]


def images(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """Of a convolution."""
    return x.shape[0] if x.ndim == len(layer.kernel_size) + 2 else None


def sequences(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """Of an attention."""
    return x.shape[batch_mode(layer)] if x.ndim == 3 else None


def bags(layer: Any, x: Tensor, offsets: Tensor | None = None, *args: Any, **kwargs: Any) -> int | None:
    """Of an EmbeddingBag: a row is one, or what begins at an offset."""
    if offsets is None:
        return x.shape[0] if x.ndim == 2 else None
    return len(offsets) - layer.include_last_offset
