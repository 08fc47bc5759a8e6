"""What runs the model on a batch, and what its loss must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flora.tuner.data_start.reduction import distributed

Loss = Callable[[nn.Module, Any], Any]


def run(model: nn.Module, batch: Any) -> Any:
    """The default of a start that needs no loss."""
    return model(batch) if isinstance(batch, Tensor) else model(**_keywords(batch))


def loss_of_model(model: nn.Module, batch: Any) -> Any:
    """The loss among the model's outputs, where transformers' Trainer looks for it."""
    output = model(**_keywords(batch))
    if isinstance(output, (tuple, list)):
        return output[0]
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"the model returns no loss: the batch has {sorted(batch)}, and needs labels; or pass loss= to "
            "flora.initialize or flora.Initialize"
        )
    return loss


def _keywords(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, not a dict of the model's arguments: pass loss= to flora.initialize "
            "or flora.Initialize"
        )
    return batch


def finite_loss(model: nn.Module, batches: Sequence[Any], number: int, loss: Loss, when: str = "") -> Tensor:
    """The loss of one batch, a tensor with one number. ``when`` says more in the message for one that is not finite."""
    value = loss(model, batch := batches[number])
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
        kind = "None" if value is None else f"a {type(value).__name__}{shape}"
        raise ValueError(f"the loss of a batch is {kind}: expected a tensor with one number")
    if not isfinite(size := value.item()):
        culprit = (
            "" if distributed() else _culprit(model, batch, loss)
        )  # other processes would not take part in a second run
        raise ValueError(f"the loss of a batch is {size}, not finite: batches[{number}]{when}{culprit}")
    return value


def _culprit(model: nn.Module, batch: Any, loss: Loss) -> str:
    """The first layer whose output is not finite, in words. The batch is run once more."""
    first: list[tuple[str, bool]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not first and not _is_finite(output):
                first.append((name, _is_finite((args, kwargs))))

        return hook

    names = {module: _plain(name) for name, module in model.named_modules()}
    handles = [module.register_forward_hook(look(name), with_kwargs=True) for module, name in names.items()]
    try:
        with torch.no_grad():
            loss(model, batch)
    except Exception:  # such as that of a loss that needs gradients: the first error is the one to tell
        return ""
    finally:
        for handle in handles:
            handle.remove()
    if not first:
        return "; the output of every layer is finite"
    (name, finite_input), *_ = first
    where = f"layer {name!r}" if name else "the model"
    either = "is finite" if finite_input else "is not finite either"
    return f"; the first output that is not finite is that of {where}, whose input {either}"


def _is_finite(values: Any) -> bool:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _plain(name: str) -> str:
    """A module's name in the user's model, without what PEFT adds."""
    return re.sub(r"^base_model(\.model)?(\.|$)|\.base_layer|\.modules_to_save\.[^.]+", "", name)
