"""``adapter_names``: the adapter of each sample, known to the call that is running and to no module.

Compiled models run eagerly in such a call: names change from call to call, and each change would compile anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import nn

from flora.layers.versions import torch_since
from flora.tuner.peft_compat import AuxiliaryTrainingWrapper

_NAMES: ContextVar[dict[nn.Module, Sequence[str]] | None] = ContextVar("flora_adapter_names", default=None)
_lock = Lock()
# older compilers can't read a context variable
COMPILERS_READ = torch_since(2, 15)


def names_for(module: nn.Module) -> Sequence[str] | None:
    """The names that the running call has for a module, or None."""
    if not COMPILERS_READ and torch.compiler.is_compiling():
        return None
    names = _NAMES.get()
    return None if names is None else names.get(module)


@contextmanager
def call_with_names(names: dict[nn.Module, Sequence[str]]) -> Iterator[None]:
    """A call with these names. Raises RuntimeError where a compiler runs that would not see them."""
    with nullcontext() if torch.compiler.is_compiling() else _lock:
        for module in names:
            # PEFT's own wrappers take the names as an argument. The hook stays, and does nothing in other calls
            if isinstance(module, AuxiliaryTrainingWrapper) and _take_names not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_take_names, with_kwargs=True)
    token = _NAMES.set(names)
    try:
        with _eager():
            yield
    finally:
        _NAMES.reset(token)


def _take_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    names = names_for(module)
    return args, kwargs if names is None else {**kwargs, "adapter_names": names}


_stances: list[Any] = []  # of the calls that run now; the first knows the one before them


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled models run eagerly, for all threads, until the last of these calls ends."""
    if torch.compiler.is_compiling():
        yield
        return
    with _lock:
        try:
            stance = torch.compiler.set_stance("force_eager")
        except RuntimeError:  # inside a compiled model, whose compiler then reads the names
            if not COMPILERS_READ:
                raise
            stance = None
        else:
            _stances.append(stance)
    try:
        yield
    finally:
        with _lock:
            if stance is not None and len(_stances) > 1:
                _stances.pop()
            elif stance is not None:
                _stances.pop().__exit__(None, None, None)
