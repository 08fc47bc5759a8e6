"""The pool of a model's forward: what ``execution.pool`` forms for its adapted layers, a chunk of them at a time.

A pool lives while the root module's forward runs. It is in a context variable, never in a module: forwards in other
threads, copies and pickles know nothing of it. A layer that asks for the first time has its chunk formed: neighbours in
the model, up to a number of weights, so that a chunk's dense gradients are projected, and freed, before those of
earlier chunks come. A layer that is called outside, or in another state than the pool's, runs in its own form, which is
always right: in a checkpointed block, both times; under ``torch.func``; while compilers or tracers look.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flora.layers.execution.cost import CHUNK, autocast_dtype, can_fuse
from flora.layers.execution.pool import form
from flora.layers.weights.sharded import has_engine, has_fsdp

if TYPE_CHECKING:
    from flora.tuner.layer import FloraLayer

# torch 2.6 and later
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "unknown")


class Ready(NamedTuple):
    """What one layer runs with.

    Attributes:
        adapter: the adapter's name.
        form: as in ``layers.execution.pool``.
        tensors: (W + ΔW,), (ΔW,), (D, U) or (K,).
        autocast: the type under autocast, or None.
        core: the adapter's core, and its version when the tensors were formed.
    """

    adapter: str
    form: str
    tensors: tuple[Tensor, ...]
    autocast: torch.dtype | None
    core: Tensor
    version: int


class Live:
    """One forward of a root module, or all those of one call of ``generate`` but the first (``keeps``)."""

    def __init__(self, root: nn.Module, chunks: dict[nn.Module, list[FloraLayer]], keeps: bool = False) -> None:
        self.root, self.chunks, self.keeps = root, chunks, keeps
        self.grad = torch.is_grad_enabled()
        self.ready: dict[nn.Module, Ready | None] = {}
        self.seen: set[nn.Module] = set()

    def of(self, layer: FloraLayer, device: str) -> Ready | None:
        """What the layer, on a device of this type, runs with. None if it should run in its own form."""
        same = torch.is_grad_enabled() == self.grad and not torch._C._are_functorch_transforms_active()
        if not same or _saved_tensors_hooks(True) is not None:
            return None
        autocast = autocast_dtype(device)
        if layer not in self.ready:
            self._form(self._chunk(layer), autocast)
        ready = self.ready[layer]
        if ready is None or ready.autocast != autocast or ready.core._version != ready.version:
            return None
        return ready

    def _chunk(self, layer: FloraLayer) -> list[FloraLayer]:
        """The layers to form now. Without gradients nothing else holds W + ΔW: one chunk at a time is enough. A layer
        that is called again, after another chunk, is formed alone."""
        chunk = self.chunks.get(layer, [layer])
        if not self.grad and not self.keeps:
            self.ready.clear()
            chunk = [layer] if layer in self.seen else chunk
            self.seen.update(chunk)
        return chunk

    def _form(self, chunk: list[FloraLayer], autocast: torch.dtype | None) -> None:
        self.ready |= dict.fromkeys(chunk)
        entries = {layer: entry for layer in chunk if (entry := layer.entry(self.keeps)) is not None}
        if entries:
            formed = form(list(entries.values()), pads=not self.keeps)
            for (layer, entry), tensors in zip(entries.items(), formed, strict=True):
                core = entry.parameters[0]
                self.ready[layer] = Ready(layer._active_adapter[0], entry.form, tensors, autocast, core, core._version)


_LIVE: ContextVar[tuple[Live, ...]] = ContextVar("flora_live", default=())
_CALL: ContextVar[dict[nn.Module, Live | None] | None] = ContextVar("flora_call", default=None)


def live() -> Live | None:
    """The pool of the forward that runs in this context."""
    stack = _LIVE.get()
    return stack[-1] if stack else None


@contextmanager
def one_call() -> Iterator[None]:
    """A call in which no parameter changes, of ``forward`` or of ``generate``: without gradients, from the second
    forward on, D and U are kept until it ends. That is thin: (i + o) · q numbers per layer. Compilers can't follow a
    context variable, and use no pool."""
    if torch.compiler.is_compiling():
        yield
        return
    token, outer = _CALL.set({}), _LIVE.get()
    try:
        yield
    finally:
        _CALL.reset(token)
        _LIVE.set(outer)  # torch calls no hook after a KeyboardInterrupt


class Chunks:
    """The adapted layers of a root module, in chunks. A copy or a pickle is empty."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, list[FloraLayer]] | None = None

    def __reduce__(self) -> tuple:
        return Chunks, ()

    def get(self, root: nn.Module) -> dict[nn.Module, list[FloraLayer]]:
        """Layer -> the layers of its chunk."""
        if self.of is None or has_engine():
            # work for several parts of a sharded model must not run before they are gathered
            self.of = {} if has_fsdp(root) else _chunks(root)
        return self.of


def _chunks(root: nn.Module) -> dict[nn.Module, list[FloraLayer]]:
    result: dict[nn.Module, list[FloraLayer]] = {}
    chunk: list[FloraLayer] = []
    size = 0
    for module in root.modules():
        if not getattr(module, "poolable", False):
            continue
        layer = cast("FloraLayer", module)
        own = prod(layer.weight_shape)
        if not chunk or size + own > CHUNK:
            chunk, size = [], 0
        chunk.append(layer)
        size += own
        result[layer] = chunk
    return result


_ATTRIBUTE = "_flora_chunks"


def attach(root: nn.Module) -> None:
    """Give the root module's forward a pool; again after its layers have changed."""
    if _ATTRIBUTE not in vars(root):
        root.register_forward_pre_hook(_enter)
        root.register_forward_hook(_leave, always_call=True)
    vars(root)[_ATTRIBUTE] = Chunks()


def detach(root: nn.Module) -> None:
    """Undo ``attach``."""
    vars(root).pop(_ATTRIBUTE, None)
    for hooks in (root._forward_pre_hooks, root._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
            root._forward_hooks_always_called.pop(key, None)


def _enter(root: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling() or not can_fuse() or _ATTRIBUTE not in vars(root):
        return
    chunks, call = vars(root)[_ATTRIBUTE].get(root), _CALL.get()
    pool = Live(root, chunks)
    if call is not None and not pool.grad:
        if root in call:
            pool = call[root] = call[root] or Live(root, chunks, keeps=True)
        else:
            call[root] = None
    _LIVE.set((*(other for other in _LIVE.get() if other.root is not root), pool))


def _leave(root: nn.Module, args: tuple, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _LIVE.set(tuple(other for other in _LIVE.get() if other.root is not root))
