"""What a user gives as batches, as a sequence of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from operator import length_hint
from typing import Any

from torch import Tensor

MOST = 32


def as_batches(batches: Any) -> Sequence[Any]:
    """A sequence as it is; of any other iterable a list of the first 32. ValueError for one batch, or anything else."""
    parts = batches if isinstance(batches, tuple) else (batches,)
    if isinstance(batches, Mapping) or any(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"batches is a {type(batches).__name__}, one batch: expected a list of batches")
    if isinstance(batches, (str, bytes)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        given = repr(batches) if batches is None else f"{batches!r}, of type {type(batches).__name__}"
        raise ValueError(
            f"batches is {given}: expected a list of batches, such as list(islice(loader, {MOST})); their number is an "
            "argument of flora.Initialize"
        )
    if not isinstance(batches, Sequence):
        batches = list(islice(batches, min(MOST, length_hint(batches, MOST))))  # some datasets have no end but a length
    if not batches:
        raise ValueError("no batches were given; a data start needs some")
    return batches
