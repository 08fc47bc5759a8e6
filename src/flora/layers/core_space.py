"""The trainable part: one core space for one weight (paper section 4, equation 5).

delta = scale · core ×_1 factors[0] … ×_N factors[N-1], with core (r_1, …, r_N) and factors[n] (I_n, r_n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from flora import ranks as rank_rules
from flora import tucker
from flora.layers.weights.parameters import is_bare
from flora.layers.weights.sharded import is_distributed, make_equal


class CoreSpace(nn.Module):
    """Core and factors of one weight. Their numbers are whatever is in memory until ``starts.start`` fills them.

    Args:
        shape: the weight's (I_1, …, I_N), in PyTorch's order.
        ranks: (r_1, …, r_N), each from 1 to I_n.
        scale: the s of equation 5. It is saved with the core, so that an adapter file needs no base model.

    Attributes:
        written_down: where else the scale stands, a dictionary and a key: in the adapter's plan, for its config.
    """

    scale: Tensor
    is_new = True  # until a start has filled it
    init = "factor"  # the config's, for a data start
    scaled_for: str | None = None  # the start that scale="auto" was solved for
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    parameter_shapes: tuple[tuple[int, ...], ...]
    started = False  # whether a data start has filled it
    written_down: tuple[dict[str, float], str] | None = None
    aside: Tensor | None = None  # the scale, of a space that was moved to the meta device
    stack: Stack | None = None  # those that share its factors

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
        self.parameter_shapes = (self.ranks, *zip(self.shape, self.ranks, strict=True))
        self.core = nn.Parameter(torch.empty(self.ranks, device=device, dtype=dtype))
        for n, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
            self.register_parameter(f"factor_{n}", nn.Parameter(torch.empty(size, rank, device=device, dtype=dtype)))
        # float64, so that 0.4 loses no digits on a float64 model
        number = torch.full((), scale, dtype=_widest(self.core.device), device=self.core.device)  # no host waits
        self.register_buffer("scale", number)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """``factors[n]`` of shape (I_n, r_n), one per mode."""
        # not get_parameter: FSDP1 puts plain views of its flat parameter in their place
        return tuple(getattr(self, name) for name in self.factor_names)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The names of the factors' parameters, one per mode."""
        return tuple(f"factor_{n}" for n in range(len(self.shape)))

    @property
    def weight(self) -> Tensor:
        """The core. By this name PEFT's wrap policy for FSDP1 knows a module that is trained."""
        return self.core

    @property
    def has_update(self) -> bool:
        """Whether delta is more than zero, as after training: no part is all zeros."""
        return not self.core.is_meta and all(bool(part.any()) for part in (self.core, *self.factors))

    def forward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``scale · core`` and the factors. A call, so that sharded training (FSDP, ZeRO-3) gathers them first.

        An engine that gathers them for this call alone takes them apart after it: then the factors are copies.
        """
        factors = self.factors
        lasting = is_bare(self) and isinstance(self._parameters.get("factor_0"), nn.Parameter)
        return self.core * self.scale, factors if lasting else tuple(factor.clone() for factor in factors)

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
    def assign(self, core: Tensor, factors: Sequence[Tensor]) -> None:
        """Copy core and factors in; the shapes must be this space's."""
        for target, source in zip((self.core, *self.factors), (core, *factors), strict=True):
            if target.shape != source.shape:
                raise ValueError(f"shape {list(source.shape)} given where {list(target.shape)} is needed")
            target.copy_(source)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Replace the s of equation 5, also where it is written down."""
        self.scale.fill_(scale)
        self.write_down(scale)

    def write_down(self, scale: float | None = None) -> None:
        """Note the scale where else it stands; without ``scale`` it is read from the device."""
        if self.written_down is not None and not self.scale.is_meta:
            scales, name = self.written_down
            scales[name] = self.scale.item() if scale is None else scale

    # accelerate moves a model to the meta device, has FSDP2 shard it there, and distributes every tensor of its state
    # dict as parameters are distributed. The scale is no such tensor: it stays aside until then.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._waits_for_fsdp():
            del destination[f"{prefix}scale"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self._waits_for_fsdp() and self.aside is not None:
            state_dict[f"{prefix}scale"] = self.aside
        if self.stack is not None:
            errors = args[-1]  # by torch's protocol, which has no names for them here
            errors += self.stack.disagreements(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.stack is not None:
            self.stack.tie()
        self.write_down()

    def _waits_for_fsdp(self) -> bool:
        return self.core.is_meta and is_distributed(self.core)

    def _apply(self, fn: Callable, recurse: bool = True) -> CoreSpace:
        # `.to(bfloat16)` of a model must not round the scale: it follows the core's device, never its dtype
        scale = cast(Tensor, self._buffers.pop("scale"))
        super()._apply(fn, recurse)
        device, dtype = self.core.device, _widest(self.core.device)
        empty = scale.is_meta and device.type != "meta"
        if device.type == "meta" and not scale.is_meta:
            self.aside = scale
        self._buffers["scale"] = torch.ones((), device=device, dtype=dtype) if empty else scale.to(device, dtype)
        if self.stack is not None:
            self.stack.tie()
        return self

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, ranks={list(self.ranks)}"


class Stack:
    """One core space for same-shaped weights of several layers, a tensor of one mode more: (L, I_1, …, I_N).

    Its core (L, r_1, …, r_N) keeps the mode of layers whole, and one factor (I_n, r_n) per other mode serves them all.
    So every weight has a ``CoreSpace`` with a slice of the core, and with the first one's factors: the same parameters.

    Args:
        spaces: of one shape, with the same ranks; the first one first in the model.
    """

    def __init__(self, spaces: Sequence[CoreSpace]) -> None:
        self.spaces = tuple(spaces)
        for space in self.spaces:
            space.stack = self
        self.tie()

    def tie(self) -> None:
        """Share the factors, also after a move or a load that gave every module parameters of its own."""
        first, *others = self.spaces
        for other in others:
            other._parameters.update({name: first._parameters[name] for name in first.factor_names})

    @property
    def is_tied(self) -> bool:
        """Whether the factors are shared. Engines that shard modules one by one take them apart."""
        first, *others = (space._parameters for space in self.spaces)
        return all(other[name] is first[name] for other in others for name in self.spaces[0].factor_names)

    def disagreements(self, space: CoreSpace, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """The factors in ``state_dict`` that differ from those that were loaded for the first space."""
        first = self.spaces[0]
        names = [name for name in first.factor_names if space is not first and f"{prefix}{name}" in state_dict]
        pairs = [(name, first.get_parameter(name), state_dict[f"{prefix}{name}"]) for name in names]
        return [
            f"{prefix}{name} differs from the factor of the first layer in its stack"
            for name, own, loaded in pairs
            if not (own.is_meta or loaded.is_meta or own.shape != loaded.shape)
            and not torch.equal(own, loaded.to(own.device, own.dtype))
        ]


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


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


def is_finite(core: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether ``core ×_1 factors[0] …`` is finite in float32 at least. It is formed only where a bound can't tell."""
    if surely_finite([core], [factors]):
        return True
    wide = torch.promote_types(core.dtype, torch.float32)
    core, *factors = (tensor.detach().to(wide) for tensor in (core, *factors))
    with torch.autocast(core.device.type, enabled=False):
        return all(bool(torch.isfinite(tensor).all()) for tensor in (*factors, tucker.reconstruct(core, factors)))


@torch.no_grad()
def surely_finite(
    cores: Sequence[Tensor],
    factors: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor] = (),
    multiplier: float = 1.0,
    weights: Sequence[Tensor] = (),
) -> bool:
    """Whether one bound shows that ``scale · multiplier · core ×_1 factors[0] …`` is finite in float32, every one of
    many: a few operations and one number read from the device. False if the bound can't tell.

    |X| ≤ Σ |core| · Π max(1, max |factor|), also for every product on the way. With ``weights``, it is of the sums
    weight + X in the types of the weights.
    """
    flat, modes = [factor for own in factors for factor in own], max(map(len, factors))
    bound = _norm(cores, 1.0) * _norm(flat, math.inf).clamp(min=1) ** modes * abs(multiplier)
    if scales:
        bound = bound * torch.stack([scale.to(bound.device) for scale in scales]).abs().max()
    if weights:
        bound = bound + _norm(weights, math.inf)
    limit = min(torch.finfo(dtype).max for dtype in {torch.float32, *(weight.dtype for weight in weights)})
    return bool(bound < limit / 2)


def _norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Of all numbers of all tensors: () float32."""
    together = {tensor.device.type for tensor in tensors} <= {"cpu", "cuda"}  # get_total_norm's default is CUDA alone
    return get_total_norm(tensors, order, foreach=together or None).float()


def drop_ranks(factors: Sequence[Tensor], mode: int, p: float, weight: Tensor) -> list[Tensor]:
    """The factors with each rank of one mode dropped with probability ``p``, the others scaled up to make up for it.

    It stands for dropout of the input, which an update that acts as a weight, or that looks up rows, does not have.
    Processes that each keep a part of ``weight`` drop the same ranks.
    """
    keep = F.dropout(factors[mode].new_ones(factors[mode].shape[1]), p)
    if is_distributed(weight):
        make_equal(keep, weight)
    return [factor * keep if n == mode else factor for n, factor in enumerate(factors)]
