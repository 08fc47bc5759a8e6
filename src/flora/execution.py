"""How an update runs: *factored*, thin layers beside the base layer, or *merged*, the base layer with W + delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.core_space import CoreSpace
from flora.kinds import Kind
from flora.tucker import reconstruct

EXECUTIONS = ("auto", "factored", "merged")
LOW_PRECISION = (torch.float16, torch.bfloat16)


def choose(requested: str, kind: Kind | None, layer: nn.Module, dtype: torch.dtype) -> str:
    """Whether the update of one weight runs "factored" or "merged".

    An update that can only act as a weight (attention's packed projections, raw parameters, layers with a forward of
    their own) is merged, whatever was requested. "auto" keeps low precision factored, since W + delta would round
    small updates away; merges grouped convolutions, whose thin layers are not thin (groups × rank channels); and runs
    everything else factored.
    """
    if kind is None or not kind.can_factor(layer):
        return "merged"
    if requested != "auto":
        return requested
    return "merged" if getattr(layer, "groups", 1) > 1 and dtype not in LOW_PRECISION else "factored"


def add_to_weight(weight: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """``weight + Σ deltas``, summed in the widest dtype and returned in the weight's: at most one rounding."""
    total = weight
    for delta in deltas:
        total = total + delta
    return total.to(weight.dtype)


def drop_ranks(factors: Sequence[Tensor], mode: int, p: float) -> list[Tensor]:
    """The factors with each rank of one mode dropped with probability ``p``, the others scaled up to make up for it.

    Dropout of the input is not defined where the update acts as a weight, or where the input is a row's number; this
    is its nearest relative there.
    """
    keep = F.dropout(factors[mode].new_ones(factors[mode].shape[1]), p)
    return [factor * keep if n == mode else factor for n, factor in enumerate(factors)]


def dropped_delta(space: CoreSpace, mode: int, p: float) -> Tensor:
    """The space's delta, with ranks of ``mode`` dropped where ``p`` is above 0."""
    if p == 0:
        return space.delta()
    core, factors = space()
    with torch.autocast(core.device.type, enabled=False):
        return reconstruct(core, drop_ranks(factors, mode, p))
