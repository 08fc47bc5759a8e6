"""A layer's weights by dotted name, and a layer run with other tensors in their place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


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
    """Whether it is an ordinary frozen tensor: not of a type of its own (sharded, quantized), and not trained."""
    return type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad


def is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer runs its class's forward and nothing else: no hooks (sharding, offloading, a user's),
    no forward set on the instance."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and "forward" not in vars(layer)


def run_with_weights(module: nn.Module, weights: dict[str, Tensor], args: tuple, kwargs: dict) -> Any:
    """Run the module's own forward with other tensors as weights, and leave the module as it was."""
    owners = {name: owner(module, name) for name in weights}
    # FSDP1 sets its view of a weight as an attribute, which would hide the tensor that we swap in
    views = {name: vars(holder).pop(leaf(name)) for name, holder in owners.items() if leaf(name) in vars(holder)}
    # the update needs a dense gradient, even if the layer asks for a sparse one
    sparse = [holder for holder in owners.values() if getattr(holder, "sparse", False)]
    for holder in sparse:
        holder.sparse = False  # type: ignore[assignment]
    try:
        return functional_call(module, weights, args, kwargs, tie_weights=False)
    finally:
        for name, view in views.items():
            vars(owners[name])[leaf(name)] = view
        for holder in sparse:
            holder.sparse = True  # type: ignore[assignment]
