"""Which execution a layer takes: *factored*, thin products added into the base layer's output, or *merged*, the base
layer with W + delta (paper section 4, equations 5 to 7)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flora.layers.versions import torch_since

EXECUTIONS = ("auto", "factored", "merged")
LOW_PRECISION = (torch.float16, torch.bfloat16)
FUNCTIONS_IN_GRAPHS = torch_since(2, 15)  # where compilers are known to follow one that turns autocast off

TOUCH = 20
FRESH, LARGE, FRESH_AND_LARGE = 60, 2**23, 240
DENSE = 0.5


@lru_cache(4096)
def merges(device: str, shape: Sequence[int], ranks: Sequence[int], positions: Sequence[int], groups: int = 1) -> bool:
    """``execution="auto"``: whether a layer on its own runs merged, in single precision.

    The cost model counts the multiplications of the products, plus ``TOUCH`` = 20 for every entry of a full-size tensor
    that is read and written in place, plus ``FRESH`` = 60 for every entry of a new one (240 above 2²³ entries, 32 MiB:
    such a tensor takes new memory each time, and fits no cache). Both executions run the base layer. Beyond that,

        factored   takes two thin products per position, the core's between them, and touches the output once;
        merged     takes two products per weight entry, and writes W + delta as a new tensor.

    The numbers are those of a CPU; on other devices, where no layer on its own was measured, all run factored. So
    layers with many positions (batch × sequence, batch × pixels) merge, and large weights do not. Half precision
    never merges, since W + delta would round small updates away. ``benchmarks/speed.py`` tests the model against
    measured times.

    Args:
        device: the device's type.
        shape, ranks: of the weight, (I_1, I_2, k …) and (r, s, …).
        positions: number of positions, batch included, in the tensor whose channels are the first mode, and in the
            tensor whose channels are the second mode.
    """
    (first, second), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    weights, core = first * second * size, 2 * r * s * size
    merged = weights * (2 * r + (FRESH if weights <= LARGE else FRESH_AND_LARGE)) + second * core
    factored = positions[0] * (first * (2 * r + TOUCH) + groups * core) + positions[1] * groups * second * 2 * s
    return device == "cpu" and merged < factored


def wants_dense(device: str, shape: Sequence[int], ranks: Sequence[int], positions: Sequence[int], groups: int) -> bool:
    """Whether a convolution's full weight gradient costs less than projecting first: depthwise kernels, narrow layers.

    On a CPU a multiplication of the full-size convolution counts ``DENSE`` = 0.5, because it runs nearer to the
    processor's peak; elsewhere multiplications are counted. Arguments as in ``merges``.
    """
    (first, second), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    dense = (DENSE if device == "cpu" else 1) * positions[0] * first * second * size
    projected = positions[0] * (2 * first * r + 3 * groups * r * s * size) + positions[1] * groups * second * 3 * s
    return dense < projected


TINY = 2**14
WIDTH, CHANNELS = 880, 320
CHUNK = 2**25
MULTIPLE = 8
THIN = {"matrix": "factored", "convolution": "kernel"}  # the form without a full-size tensor


class Weight(NamedTuple):
    """What decides how a weight runs together with others.

    Attributes:
        device: the device's type.
        kind: "matrix", "convolution", or "stack": matrices (E, o, i) in one tensor, which a model takes one by one.
        shape: the weight's.
        dtype: the type that W is kept in. low: the type that the layer computes in.
        trains: whether gradients are wanted.
    """

    device: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: torch.dtype
    trains: bool


def may_pool(device: str, is_matrix: bool, trains: bool) -> bool:
    """What ``cheapest`` knows without the weight: whether any of this kind is formed together with others."""
    return device == "cuda" or (device == "cpu" and (trains or not is_matrix))


def cheapest(weight: Weight) -> str | None:
    """The form (as in ``pool``) of a weight that is formed together with others; None if it should run on its own.

    This is the table of what was measured (``benchmarks/README.md``). To form weights together saves launches and
    Python. On a GPU these dominate, so there the answer does not depend on the number of positions:

        CUDA   matrix        merged if o · i / (o + i) < ``WIDTH``, else factored
               convolution   merged up to ``CHANNELS`` channels, else kernel
               stack         merged if its matrices are, with gradients, up to ``CHUNK`` numbers: without gradients a
                             model may need a few of the matrices only, and forms them again for each token
        CPU    both          merged up to ``TINY`` numbers, else factored and kernel, with which each layer runs by
                             itself; matrices only with gradients, since their pool pays in the backward pass

    Merged, W + ΔW is rounded to the type that the layer computes in, as weights are in mixed-precision training. This
    would lose updates that are small beside the rounding of a W that is itself kept in half precision. There, and on a
    CPU under autocast too, ΔW is kept apart: a matrix on CUDA is factored, the others take the form delta.
    """
    first, second = weight.shape[-2:] if weight.kind == "stack" else weight.shape[:2]
    apart = weight.dtype in LOW_PRECISION
    if weight.device == "cpu" and weight.kind != "stack":
        if not may_pool("cpu", weight.kind == "matrix", weight.trains):
            return None
        if prod(weight.shape) > TINY:
            return THIN[weight.kind]
        return "delta" if apart or weight.low in LOW_PRECISION else "merged"
    if weight.device != "cuda":
        return None
    is_narrow = first * second < WIDTH * (first + second)
    if weight.kind == "matrix":
        return "merged" if is_narrow and not apart else "factored"
    if weight.kind == "stack":
        together = is_narrow and not apart and weight.trains and prod(weight.shape) <= CHUNK
        return "merged" if together else None
    return "kernel" if max(first, second) > CHANNELS else "delta" if apart else "merged"


def pooled(weight: Weight, execution: str) -> str | None:
    """The form in which a weight takes part in a pool: the cheapest one, or that of the user's choice, where pools pay
    at all. None if it should run on its own."""
    form = cheapest(weight)
    if execution == "auto" or form is None:
        return form
    if weight.kind == "stack":
        return None
    if weight.device != "cuda" and form in THIN.values():
        return form  # the layer itself does what was chosen
    if execution == "factored":
        return THIN[weight.kind]
    return "delta" if weight.dtype in LOW_PRECISION else "merged"


def adds_in_place(device: str) -> bool:
    """Whether a factored matrix of a pool runs as an autograd function, which adds to full-size tensors in place.
    Plain operations are fewer without gradients, and have less Python on a GPU, where launches count."""
    return device == "cpu" and torch.is_grad_enabled()


def in_graph(weight: Weight) -> str | None:
    """The form that a compiler sees of a layer by itself: "merged", "delta" or "factored"; None if nothing is known.

    A graph has no Python, and a kernel less is what counts: the table of ``cheapest``, with two exceptions. A small
    matrix in half precision is factored, since beside W the thin products are fewer than those of ΔW. Under autocast
    only delta is known, by ``in_graph.delta_in_graph``, which ``torch.func`` cannot transform: compilers run the
    backward pass of plain products under autocast, and cast what is formed in float32 again and again.
    """
    form = cheapest(weight)
    if form == "kernel":
        return None
    if weight.low != weight.dtype:
        possible = FUNCTIONS_IN_GRAPHS and not torch._C._are_functorch_transforms_active()
        return form if form == "delta" and possible else None
    return "factored" if form == "delta" and weight.kind == "matrix" else form


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type under autocast on this type of device; None without autocast."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a layer with this weight computes."""
    autocast = autocast_dtype(weight.device.type)
    return weight.dtype if autocast is None or weight.dtype == torch.float64 else autocast


def padded(rank: int, dtype: torch.dtype, device: str) -> int:
    """The rank of thin products that a device likes: in half precision on a GPU the next multiple of ``MULTIPLE``."""
    return rank + -rank % MULTIPLE if device == "cuda" and dtype in LOW_PRECISION else rank


def can_fuse() -> bool:
    """Whether the autograd functions may run. Compilers and tracers need plain operations, torch.func's transforms
    operations that are not in place, and forward-mode derivatives operations that have them."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
    return not traced and not torch._C._are_functorch_transforms_active()


def without_autocast(device: str) -> AbstractContextManager:
    """A context without autocast for this type of device."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def of_one_type(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Input, weight and bias, cast under autocast; None if their types differ otherwise. The core's type may be another
    one under autocast, and float32 in a half-precision layer."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:
        bias = bias if bias is None else bias.to(dtype)
        return x.to(dtype), weight.to(dtype), bias
    fits = core.dtype in (x.dtype, torch.float32) if x.dtype in LOW_PRECISION else core.dtype == x.dtype
    return (x, weight, bias) if fits and x.dtype == weight.dtype else None
