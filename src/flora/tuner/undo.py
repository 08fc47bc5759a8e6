"""Undo a half-finished change of a model after an error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

CONTAINERS = (dict, list, OrderedDict)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module its children, attributes and trained parameters back if the block raises."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    # the plain containers in which modules keep their children, parameters, hooks and adapters
    inside = [(held, held.copy()) for _, state in before for held in state.values() if type(held) in CONTAINERS]
    try:
        yield
    except BaseException:
        for state, kept in [*before, *inside]:  # in place: handles of hooks point at these very containers
            if isinstance(state, list):
                state[:] = kept
            else:
                state.clear()
                state.update(kept)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
