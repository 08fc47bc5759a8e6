"""A number that stands for all bits of a weight: it shows a change without a second copy of the weight."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 17  # numbers that are taken together, as fit a processor's cache
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint(NamedTuple):
    """Of the part of a weight that this process keeps."""

    dtype: torch.dtype
    number: Tensor  # () int64, on the weight's device: no merge waits for it

    def fits(self, weight: Tensor) -> bool:
        """Whether these may be the weight's bits. A weight that was cast meanwhile has others, and fits."""
        return self.dtype != weight.dtype or self.number.item() == fingerprint(weight).number.item()


@torch.no_grad()
def fingerprint(weight: Any) -> Fingerprint:
    """A linear hash: the numbers' bits as integers, times random odd integers, summed modulo 2⁶⁴. A change of one
    number always changes it, and other changes are missed as rarely as a random sum is zero."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight.detach()
    bits, odd = part.reshape(-1).view(INTEGERS[part.itemsize]), _odd(part.device)
    first, *others = ((block * odd[: len(block)]).sum() for block in bits.split(BLOCK))
    for number in others:
        first = torch.add(number, first, alpha=3)
    return Fingerprint(part.dtype, first)


@cache
def _odd(device: torch.device) -> Tensor:
    return (torch.randint(1 << 62, (BLOCK,), generator=torch.Generator().manual_seed(0)) | 1).to(device)
