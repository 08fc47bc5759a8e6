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

from flora.layers.execution.cost import CHUNK, autocast_dtype, can_fuse, may_pool
from flora.layers.execution.pool import Entry, Plan, form, plan
from flora.layers.weights.sharded import has_engine, has_fsdp

if TYPE_CHECKING:
    from flora.tuner.layer import FloraLayer
    from flora.tuner.pooled_weight import Given

_transforms_active = torch._C._are_functorch_transforms_active
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

    def __init__(self, root: nn.Module, chunks: dict[nn.Module, Chunk], keeps: bool = False) -> None:
        self.root, self.chunks, self.keeps = root, chunks, keeps
        self.grad = torch.is_grad_enabled()
        self.ready: dict[nn.Module, Ready | None] = {}
        self.seen: set[nn.Module] = set()

    def of(self, layer: FloraLayer, device: str) -> Ready | None:
        """What the layer, on a device of this type, runs with. None if it should run in its own form."""
        if not self._wants(layer, device):
            return None
        if torch.is_grad_enabled() != self.grad or _transforms_active() or _saved_tensors_hooks(True) is not None:
            return None
        autocast = autocast_dtype(device)
        try:
            ready = self.ready[layer]
        except KeyError:
            self._form(self._chunk(layer), autocast, device)
            ready = self.ready[layer]
        if ready is None or ready.autocast != autocast or ready.core._version != ready.version:
            return None
        return ready

    def _wants(self, layer: FloraLayer, device: str) -> bool:
        return self.keeps or may_pool(device, layer.kind.is_matrix, self.grad)

    def _chunk(self, layer: FloraLayer) -> Chunk:
        """The layers to form now. Without gradients nothing else holds W + ΔW: one chunk at a time is enough. A layer
        that is called again, after another chunk, is formed alone."""
        chunk = self.chunks.get(layer) or Chunk([layer])
        if not self.grad and not self.keeps:
            self.ready.clear()
            chunk = Chunk([layer]) if layer in self.seen else chunk
            self.seen.update(chunk.layers)
        return chunk

    def _form(self, chunk: Chunk, autocast: torch.dtype | None, device: str) -> None:
        given = [layer.given() if self._wants(layer, device) else None for layer in chunk.layers]
        marks = (autocast, self.grad, self.keeps, [own and own.marks for own in given])
        known = chunk.known
        if known is None or known.marks != marks:
            choices = [own and layer.choice(own, self.keeps) for layer, own in zip(chunk.layers, given, strict=True)]
            known = Known(marks, choices, plan(chunk.entries(given, choices)))
            chunk.known = known
        self.ready |= dict.fromkeys(chunk.layers)
        chosen = [n for n, choice in enumerate(known.choices) if choice is not None]
        formed = form(chunk.entries(given, known.choices), plans=known.plans, pads=not self.keeps)
        for n, tensors in zip(chosen, formed, strict=True):
            own, (name, _) = cast("Given", given[n]), cast(tuple[str, torch.dtype], known.choices[n])
            core = own.parameters[0]
            self.ready[chunk.layers[n]] = Ready(own.adapter, name, tensors, autocast, core, core._version)


class Known(NamedTuple):
    """How a chunk was formed the last time. It holds no tensor.

    Attributes:
        marks: of torch's state and of the layers. While they stay, so does the rest.
        choices: per layer its form and the type that it computes in; None if it runs on its own.
        plans: as ``layers.execution.pool.form`` takes them.
    """

    marks: tuple
    choices: list[tuple[str, torch.dtype] | None]
    plans: list[Plan]


class Chunk:
    """Layers that are formed together."""

    def __init__(self, layers: list[FloraLayer]) -> None:
        self.layers = layers
        self.known: Known | None = None

    def entries(self, given: list[Given | None], choices: list[tuple[str, torch.dtype] | None]) -> list[Entry]:
        """What is formed, of the layers that do not run on their own."""
        every = zip(self.layers, given, choices, strict=True)
        return [layer.entry(own, *choice) for layer, own, choice in every if own is not None and choice is not None]


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
        self.of: dict[nn.Module, Chunk] | None = None

    def __reduce__(self) -> tuple:
        return Chunks, ()

    def get(self, root: nn.Module) -> dict[nn.Module, Chunk]:
        """Layer -> its chunk."""
        if self.of is None or has_engine():
            # work for several parts of a sharded model must not run before they are gathered
            self.of = {} if has_fsdp(root) else _chunks(root)
        return self.of


def _chunks(root: nn.Module) -> dict[nn.Module, Chunk]:
    result: dict[nn.Module, Chunk] = {}
    chunk, size = Chunk([]), 0
    for module in root.modules():
        if not getattr(module, "poolable", False):
            continue
        layer = cast("FloraLayer", module)
        own = prod(layer.weight_shape)
        if not chunk.layers or size + own > CHUNK:
            chunk, size = Chunk([]), 0
        chunk.layers.append(layer)
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
