"""A layer's weights by dotted name, and a layer run with other tensors in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flora.layers.weights.offload import offloading_hook


def owner(layer: nn.Module, weight: str) -> nn.Module:
    """The submodule of ``layer`` that holds the weight with this dotted name."""
    return layer.get_submodule(weight.rpartition(".")[0])


def leaf(weight: str) -> str:
    """The last part of a dotted name."""
    return weight.rpartition(".")[2]


def parameter_of(layer: nn.Module, weight: str) -> nn.Parameter | None:
    """The parameter with this dotted name; None if the layer computes it, or has none."""
    return owner(layer, weight)._parameters.get(leaf(weight))


def full_name(module: str, weight: str) -> str:
    """The layer's name, followed by the weight's unless that is plainly "weight"."""
    return module if weight == "weight" else f"{module}.{weight}"


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The full shape, even while ZeRO-3 keeps only a part of the weight here."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_plain(weight: Tensor) -> bool:
    """Whether it is an ordinary frozen tensor: not of a type of its own (sharded, quantized), nor of numbers that only
    store (float8), and not trained."""
    is_ordinary = (
        type(weight) in (nn.Parameter, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    )
    return is_ordinary and not weight.requires_grad and not hasattr(weight, "ds_id")


def is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer runs its class's forward and nothing else: no hooks (sharding, offloading, a user's),
    no forward set on the instance."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and "forward" not in vars(layer)


def run_with_weights(module: nn.Module, weights: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
    """Run the module's own forward with other tensors as weights.

    A shallow copy runs, so that other threads always see the module as it is. What the forward itself stores in the
    module (a cache, an attention map) is kept. Raises ValueError for what would be exported wrongly.
    """
    if torch.compiler.is_compiling():  # compilers follow this form, and nothing is swapped when their graph runs
        with _without_views(module, weights):
            return functional_call(module, weights, args, kwargs, tie_weights=False)
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export() and getattr(module, "max_norm", None) is not None:
        raise ValueError(
            "torch's older exporter to ONNX leaves out max_norm: export with dynamo=True, or without max_norm"
        )
    copies = _copies(module, weights)
    before = [(original, copy, dict(vars(copy))) for original, copy in copies]
    result = copies[0][1](*args, **kwargs)
    for original, copy, state in before:
        vars(original).update({k: v for k, v in vars(copy).items() if k not in state or state[k] is not v})
    return result


def _copies(module: nn.Module, weights: dict[str, Tensor]) -> list[tuple[nn.Module, nn.Module]]:
    """(original, shallow copy) of the module, and of those below it that lead to the weights."""
    originals = {id(module): module}
    for name in weights:
        holder = module
        for part in name.split(".")[:-1]:
            holder = getattr(holder, part)
            originals[id(holder)] = holder
    copies: dict[int, Any] = {key: object.__new__(type(original)) for key, original in originals.items()}
    for key, original in originals.items():
        state = vars(copies[key])
        state.update(vars(original), _parameters=dict(original._parameters))
        state["_modules"] = {name: copies.get(id(child), child) for name, child in original._modules.items()}
        state["_compiled_call_impl"] = None  # it would run the original
        for name, value in vars(original).items():
            if isinstance(value, (MethodType, FunctionType, partial)):
                state[name] = _rebound(value, copies)
        if (
            offloading_hook(original) is not None
        ):  # what has been loaded for the copy must not be loaded over its weights
            state["forward"] = state["_old_forward"]
        if state.get("sparse"):
            state["sparse"] = False  # the update needs a dense gradient, even if the layer asks for a sparse one
    for name, weight in weights.items():
        holder = copies[id(owner(module, name))]
        holder._parameters[leaf(name)] = weight
        vars(holder).pop(leaf(name), None)  # FSDP1 sets its view of a weight as an attribute, which would hide ours
    return [(original, copies[key]) for key, original in originals.items()]


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A function that a user has put into a module (a forward of its own, an offloading hook), with the copies in the
    place of their originals; the value itself if it holds none of them."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, copies))
    if isinstance(value, partial):
        keywords = {name: _rebound(argument, copies) for name, argument in value.keywords.items()}
        return partial(_rebound(value.func, copies), *(_rebound(a, copies) for a in value.args), **keywords)
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    copies = {**copies, id(value): value}  # it may hold itself
    cells = []
    for cell in value.__closure__:
        content = _rebound(cell.cell_contents, copies)
        cells.append(cell if content is cell.cell_contents else CellType(content))
    new = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    new.__kwdefaults__ = value.__kwdefaults__
    return new


@contextmanager
def _without_views(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """The module without FSDP1's views of the weights, and with dense gradients."""
    owners = {name: owner(module, name) for name in weights}
    views = {name: vars(holder).pop(leaf(name)) for name, holder in owners.items() if leaf(name) in vars(holder)}
    sparse = [holder for holder in owners.values() if getattr(holder, "sparse", False)]
    for holder in sparse:
        holder.sparse = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, view in views.items():
            vars(owners[name])[leaf(name)] = view
        for holder in sparse:
            holder.sparse = True  # type: ignore[assignment]
