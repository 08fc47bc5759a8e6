"""Which execution a layer takes: *factored*, thin products added into the base layer's output, or *merged*, the base
layer with W + delta (paper section 4, equations 5 to 7)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

EXECUTIONS = ("auto", "factored", "merged")
LOW_PRECISION = (torch.float16, torch.bfloat16)

TOUCH = 20
FRESH, LARGE, FRESH_AND_LARGE = 60, 2**23, 240
DENSE = 0.5


def merges(shape: Sequence[int], ranks: Sequence[int], positions: Sequence[int], groups: int = 1) -> bool:
    """``execution="auto"``: whether a layer runs merged, in single precision.

    The cost model counts the multiplications of the products, plus ``TOUCH`` = 20 for every entry of a full-size tensor
    that is read and written in place, plus ``FRESH`` = 60 for every entry of a new one (240 above 2²³ entries, 32 MiB:
    such a tensor takes new memory each time, and fits no cache). Both executions run the base layer. Beyond that,

        factored   takes two thin products per position, the core's between them, and touches the output once;
        merged     takes two products per weight entry, and writes W + delta as a new tensor.

    So layers with many positions (batch × sequence, batch × pixels) merge, and large weights do not. Half precision
    never merges, since W + delta would round small updates away. ``benchmarks/speed.py`` tests the model against
    measured times.

    Args:
        shape, ranks: of the weight, (I_1, I_2, k …) and (r, s, …).
        positions: number of positions, batch included, in the tensor whose channels are the first mode, and in the
            tensor whose channels are the second mode.
    """
    (first, second), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    weights, core = first * second * size, 2 * r * s * size
    merged = weights * (2 * r + (FRESH if weights <= LARGE else FRESH_AND_LARGE)) + second * core
    factored = positions[0] * (first * (2 * r + TOUCH) + groups * core) + positions[1] * groups * second * 2 * s
    return merged < factored


def wants_dense(shape: Sequence[int], ranks: Sequence[int], positions: Sequence[int], groups: int) -> bool:
    """Whether a convolution's full weight gradient costs less than projecting first: depthwise kernels, narrow layers.

    A multiplication of the full-size convolution counts ``DENSE`` = 0.5, because it runs nearer to the processor's
    peak. Arguments as in ``merges``.
    """
    (first, second), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    dense = DENSE * positions[0] * first * second * size
    projected = positions[0] * (2 * first * r + 3 * groups * r * s * size) + positions[1] * groups * second * 3 * s
    return dense < projected


def can_fuse() -> bool:
    """Whether the autograd functions may run. Compilers and tracers need plain operations, and torch.func's transforms
    need operations that are not in place."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and not torch._C._are_functorch_transforms_active()


def of_one_type(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, list[Tensor]] | None:
    """The same tensors, cast under autocast; None if their types differ."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        bias = bias if bias is None else bias.to(dtype)
        return x.to(dtype), weight.to(dtype), bias, core.to(dtype), [factor.to(dtype) for factor in factors]
    return (x, weight, bias, core, list(factors)) if x.dtype == weight.dtype == core.dtype else None
