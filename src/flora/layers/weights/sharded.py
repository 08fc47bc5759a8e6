"""Weights that an engine keeps in parts: DeepSpeed ZeRO-3, FSDP around single layers, tensor parallelism.

Such a weight is whole, or what its layer computes with, only while the layer's own forward runs: the engine's hooks
make it so just before, and undo it just after.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from flora.layers.weights.parameters import leaf, owner


def in_parts(weight: Tensor, shape: Sequence[int]) -> bool:
    """Whether an engine may keep only a part of the weight, of the whole shape (I_1, …, I_N), between forwards."""
    return is_flat(weight, shape) or is_distributed(weight) or hasattr(weight, "ds_id")


def is_flat(weight: Tensor, shape: Sequence[int]) -> bool:
    """Whether only a part of the weight is here, as between the forwards of FSDP1 and ZeRO-3."""
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return False
    if weight.numel() != prod(shape):
        return True
    # FSDP1 without the original parameters leaves views of memory that it has given back
    return not torch.compiler.is_compiling() and not weight.is_meta and weight.untyped_storage().size() == 0


def has_engine() -> bool:
    """Whether an engine may hold the memory of a weight, which then must be written to and not replaced."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def has_fsdp(model: nn.Module) -> bool:
    """Whether FSDP gathers parts of the model when they run."""
    return has_engine() and any(
        cls.__name__.startswith("FSDP") or cls.__name__ == "FullyShardedDataParallel"
        for module in model.modules()
        for cls in type(module).__mro__[:2]
    )


def first_alone_loads() -> bool:
    """Whether transformers loads a model's weights in the first process only, for accelerate to distribute by FSDP."""
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return has_engine() and all(os.environ.get(flag, "").lower() in ("true", "1") for flag in flags)


def of_first_process(numbers: list[float]) -> list[float]:
    """The first process's numbers, if it alone has loaded the model."""
    if first_alone_loads():
        torch.distributed.broadcast_object_list(numbers)
    return numbers


def has_master_copy(parameter: Tensor) -> bool:
    """Whether DeepSpeed's optimizer has a copy of the parameter, which its next step would put in its place."""
    return hasattr(parameter, "_hp_mapping")


def is_distributed(weight: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(weight, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor, gathered from all processes if it is a DTensor. Every process must call it."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


@contextmanager
def gathered(tensors: Iterable[Any], write: bool = False) -> Iterator[None]:
    """Within it, the tensors that ZeRO-3 has partitioned are whole. With ``write`` it keeps what is written to them."""
    missing = [t for t in tensors if hasattr(t, "ds_id") and t.ds_status.name != "AVAILABLE"]
    if missing:
        import deepspeed

        with deepspeed.zero.GatheredParameters(missing, modifier_rank=0 if write else None):
            yield
    else:
        yield


def make_equal(tensor: Tensor, weight: Any) -> None:
    """Give all processes that keep parts of a distributed weight the first one's numbers, in place."""
    for group in weight.device_mesh.get_all_groups():
        torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group)


@torch.no_grad()
def overwrite(weight: Any, value: Any) -> None:
    """Put the numbers of ``value``, whole or distributed as the weight is, into the weight."""
    if is_distributed(weight):
        part: Any = value if is_distributed(value) else part_like(value, weight)
        weight.to_local().copy_(part.to_local())
    elif has_engine():
        weight.copy_(value)
    else:
        weight.data = value.to(weight.device, weight.dtype)


def part_like(tensor: Tensor, weight: Any) -> Tensor:
    """The part of a tensor that this process keeps of the weight. Its gradient is the sum over all processes."""
    if not is_distributed(weight):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=weight.placements)


@contextmanager
def swapped(layer: nn.Module, name: str, form: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the layer's forward runs, its weight is ``form(weight)``: swapped after the engine's hook that makes the
    weight whole, and back before the hook that takes it apart. Not for concurrent calls, as the engines are not."""
    layer = getattr(layer, "_fsdp_wrapped_module", layer)
    holder, key, kept = owner(layer, name), leaf(name), []

    def swap(*_: Any) -> None:
        places: Any = vars(holder) if key in vars(holder) else holder._parameters  # FSDP1 sets plain attributes
        weight = places[key]
        kept.append((places, weight, getattr(holder, "sparse", None)))
        places[key] = form(weight)
        if kept[-1][2]:
            holder.sparse = False  # type: ignore[assignment]  # the update needs a dense gradient

    def swap_back(*_: Any) -> None:
        places, weight, sparse = kept.pop()
        places[key] = weight
        if sparse:
            holder.sparse = True  # type: ignore[assignment]

    before = layer.register_forward_pre_hook(swap)
    after = layer.register_forward_hook(swap_back, prepend=True, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
