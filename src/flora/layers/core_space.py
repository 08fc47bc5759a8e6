"""The trainable part: one core space for one weight (paper section 4, equation 5).

delta = scale · core ×_1 factors[0] … ×_N factors[N-1], with core (r_1, …, r_N) and factors[n] (I_n, r_n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora import ranks as rank_rules
from flora import tucker

PART = 4.0


def unified_scale(weight: Tensor, fan_in: int, ranks: Sequence[int]) -> float:
    """``scale="auto"``: one rule for all backbones, in place of the paper's s in {0.04, 0.4, 4}.

    Let every trained number be of order one: factors and core with entries of unit root mean square. An entry of the
    delta is then a sum of r_1 · … · r_N products of independent numbers of order one, so

        rms(delta) = scale · √(r_1 … r_N)

    and a unit change of the core moves the weight by a fixed part of the weight's own size exactly if

        scale = PART · rms(weight) / √(r_1 … r_N).

    Shape, kind, order, ranks and start drop out. What PART is, only the learning rate can tell: Adam moves a number by
    about the learning rate a step, whatever its gradient. LoRA as it is mostly used (rank r of 8 to 16, alpha = 2 r,
    Kaiming's factor of rms 1/√(3 I_in), a weight of rms 1/√I_in) moves its weight by 2 √(r/3), that is 3.3 to 4.6 times
    its own size, for a unit change of its zero factor. With 4 here, a learning rate that suits LoRA suits this too.

    A weight of zeros has no size of its own; it counts as one drawn with variance 1 / fan_in. Of a large weight some
    2¹⁶ entries are looked at, spread evenly: their root mean square is the weight's to half a percent.
    """
    numbers = weight.detach().reshape(-1)
    some = numbers[:: numbers.numel() >> 16 | 1]  # an odd step, so as not to follow a column
    rms = _rms(some) or _rms(numbers) or 1 / math.sqrt(fan_in)
    return PART * rms / math.sqrt(math.prod(ranks))


def _rms(numbers: Tensor) -> float:
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    return torch.linalg.vector_norm(numbers, dtype=dtype).item() / math.sqrt(numbers.numel())


class CoreSpace(nn.Module):
    """Core and factors of one weight.

    Args:
        shape: the weight's (I_1, …, I_N), in PyTorch's order.
        ranks: (r_1, …, r_N), each from 1 to I_n.
        scale: the s of equation 5. It is saved with the core, so that an adapter file needs no base model.
    """

    scale: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        ranks: Sequence[int],
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not rank_rules.fits(ranks, shape):
            raise ValueError(
                f"ranks {list(ranks)} for shape {list(shape)}: one rank per mode is needed, from 1 to its size"
            )
        self.shape = tuple(shape)
        self.ranks = tuple(ranks)
        self.core = nn.Parameter(torch.zeros(self.ranks, device=device, dtype=dtype))
        for n, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
            self.register_parameter(f"factor_{n}", nn.Parameter(torch.zeros(size, rank, device=device, dtype=dtype)))
        # float64, so that 0.4 loses no digits on a float64 model
        self.register_buffer("scale", torch.tensor(scale, dtype=_widest(self.core.device), device=self.core.device))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """``factors[n]`` of shape (I_n, r_n), one per mode."""
        # not get_parameter: FSDP1 puts plain views of its flat parameter in their place
        return tuple(getattr(self, f"factor_{n}") for n in range(len(self.shape)))

    def forward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``scale · core`` and the factors. A call, so that sharded training (FSDP, ZeRO-3) gathers them first."""
        return self.core * self.scale, self.factors

    def delta(self) -> Tensor:
        """``scale · core ×_1 factors[0] …``: (I_1, …, I_N), in PyTorch's order (equations 5 to 7).

        Computed in float32 at least, whatever autocast says; returned in the core's dtype.
        """
        core, factors = self()
        wide = torch.promote_types(core.dtype, torch.float32)
        with torch.autocast(core.device.type, enabled=False):
            delta = tucker.reconstruct(core.to(wide), [factor.to(wide) for factor in factors])
        return delta.to(self.core.dtype)

    @torch.no_grad()
    def start(self, init: str, output_mode: int, unit: bool) -> None:
        """Fill core and factors as the start ``init`` says (``STARTS``).

        ``unit`` gives the random entries unit variance, as ``scale="auto"`` presumes; without it every random factor
        has columns of about unit length, which suits a scale given as a number.
        """
        STARTS[init](self, output_mode, unit)

    @torch.no_grad()
    def assign(self, core: Tensor, factors: Sequence[Tensor]) -> None:
        """Copy core and factors in; the shapes must be this space's."""
        for target, source in zip((self.core, *self.factors), (core, *factors), strict=True):
            if target.shape != source.shape:
                raise ValueError(f"shape {list(source.shape)} given where {list(target.shape)} is needed")
            target.copy_(source)

    def _apply(self, fn: Callable, recurse: bool = True) -> CoreSpace:
        # `.to(bfloat16)` of a model must not round the scale: it follows the core's device, never its dtype
        scale = cast(Tensor, self._buffers.pop("scale"))
        super()._apply(fn, recurse)
        device, dtype = self.core.device, _widest(self.core.device)
        empty = scale.is_meta and device.type != "meta"
        self._buffers["scale"] = torch.ones((), device=device, dtype=dtype) if empty else scale.to(device, dtype)
        return self

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, ranks={list(self.ranks)}"


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _gaussian_(space: CoreSpace, mode: int, unit: bool) -> None:
    space.factors[mode].normal_(std=1.0 if unit else space.shape[mode] ** -0.5)


def _start_core(space: CoreSpace, output_mode: int, unit: bool) -> None:
    """The paper's: core zero, factors random Gaussian (section 4, after LoRA's section 3.1)."""
    for mode in range(len(space.shape)):
        _gaussian_(space, mode, unit)


def _start_factor(space: CoreSpace, output_mode: int, unit: bool) -> None:
    """LoRA's: only the output factor is zero. The core's output unfolding starts orthogonal, as G = I would be,
    so that every column of the output factor sees another part of the input."""
    _start_core(space, output_mode, unit)
    rows = tucker.unfold(space.core, output_mode)
    start = nn.init.orthogonal_(torch.empty(rows.shape, dtype=torch.float32, device=rows.device))
    if unit:
        start *= math.sqrt(max(rows.shape))
    space.core.copy_(start.reshape(space.core.movedim(output_mode, 0).shape).movedim(0, output_mode))
    space.factors[output_mode].zero_()


def _start_official(space: CoreSpace, output_mode: int, unit: bool) -> None:
    """The authors' variant of "core": factors by Kaiming's uniform rule with a = √5, whatever the scale."""
    for factor in space.factors:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def _start_random(space: CoreSpace, output_mode: int, unit: bool) -> None:
    """Nothing zero: ``init_weights=False``, for tests that need an adapter with an effect."""
    _start_core(space, output_mode, unit)
    # as small against the weight as LoRA's, so that the same tolerances suit both
    space.core.normal_(std=0.1 if unit else 1.0)


STARTS: dict[str, Callable[[CoreSpace, int, bool], None]] = {
    "core": _start_core,
    "factor": _start_factor,
    "gradient": _start_factor,  # until flora.initialize has seen a batch
    "official": _start_official,
    "random": _start_random,
}


def add_updates(weight: Tensor, spaces: Iterable[tuple[Tensor, Sequence[Tensor]]], in_place: bool = False) -> Tensor:
    """``weight + Σ core ×_1 factors[0] …``: summed in float32 at least, whatever autocast says, and rounded once.

    Returns the sum. ``in_place`` may overwrite the weight if that saves a tensor of its size.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    with torch.autocast(weight.device.type, enabled=False):
        for core, factors in spaces:
            core, *factors = (tensor.to(weight.device, wide) for tensor in (core, *factors))
            total = tucker.add_tucker(total, core, factors, in_place and total.is_contiguous())
    return total.to(weight.dtype)


def drop_ranks(factors: Sequence[Tensor], mode: int, p: float) -> list[Tensor]:
    """The factors with each rank of one mode dropped with probability ``p``, the others scaled up to make up for it.

    It stands for dropout of the input, which an update that acts as a weight, or that looks up rows, does not have.
    """
    keep = F.dropout(factors[mode].new_ones(factors[mode].shape[1]), p)
    return [factor * keep if n == mode else factor for n, factor in enumerate(factors)]
