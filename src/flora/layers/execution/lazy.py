"""A weight that is formed when something computes with it.

Models read a layer's weight for its type, its device or its shape (T5's ``wo.weight.dtype``), and a few compute with it
(the attention of Swin, EVA and BEiT). A ``LazyWeight`` answers the first without forming W + ΔW, and is W + ΔW in any
operation, also in those that only see it below Python: in an autograd function, in a C++ operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map_only


class _Once:
    """Calls a function once, with a graph if one was wanted when the weight was read."""

    def __init__(self, form: Callable[[], Tensor], graph: bool) -> None:
        self.form, self.graph, self.result = form, graph, cast(Tensor | None, None)

    def __call__(self) -> Tensor:
        if self.result is None:
            with torch.set_grad_enabled(self.graph):
                self.result = self.form()
        return self.result


class LazyWeight(Tensor):
    """A tensor without numbers of its own; ``dense()`` forms them."""

    dense: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, form: Callable[[], Tensor], parameters: Sequence[Tensor]) -> LazyWeight:
        """The tensor that ``form()`` gives, which has the type, place and shape of ``like`` and is computed from
        ``parameters``."""
        graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        once = _Once(form, graph)
        return _Later.apply(like, once, *parameters) if graph else LazyWeight._wrap(like, once)

    @staticmethod
    def _wrap(like: Tensor, form: Callable[[], Tensor]) -> LazyWeight:
        new = Tensor._make_wrapper_subclass(
            LazyWeight, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        new.dense = form
        return new

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function not in PLACE_AND_SHAPE:
                args, kwargs = tree_map_only(LazyWeight, lambda lazy: lazy.dense(), (args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(LazyWeight, lambda lazy: lazy.dense().detach(), (args, kwargs or {}))
        return function(*args, **kwargs)


class _Later(Function):
    """Parameters -> a ``LazyWeight``. Whatever consumed it below Python gives its gradient here."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, form: Callable[[], Tensor], *parameters: Tensor) -> LazyWeight:
        ctx.form = form
        ctx.save_for_backward(*parameters)
        return LazyWeight._wrap(like, form)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        given = torch.autograd.grad(
            ctx.form(),
            ctx.saved_tensors,
            gradients,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return None, None, *given


def getters(*properties: str) -> list[Callable]:
    """What ``__torch_function__`` is given when these properties of a tensor are read."""
    return [getattr(Tensor, name).__get__ for name in properties]


PLACE_AND_SHAPE: set[Callable] = {
    *getters("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "requires_grad", "layout"),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.__len__),
    *(Tensor.element_size, Tensor.is_complex, torch.is_floating_point, torch.numel),
}
