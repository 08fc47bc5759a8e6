"""Weights that accelerate has offloaded to the computer's memory or a disk.

They are on the meta device but for the forward of their module, whose hook loads them just before and drops them just
after. A change of them lasts only if it is written to where the hook loads them from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn


def offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that loads the module's weights; None if they stay where they are."""
    hook = vars(module).get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights, or those of modules in it, for each forward."""
    return any(offloading_hook(each) is not None for each in module.modules())


@contextmanager
def loaded(layer: nn.Module, write: bool = False) -> Iterator[None]:
    """Within it, the weights of the layer and of the modules in it are here. With ``write`` they are kept as the block
    leaves them: in the computer's memory, also if they came from a disk."""
    # in two steps: compilers before torch 2.15 can't follow an assignment in a list
    found = [(module, offloading_hook(module)) for module in layer.modules()]
    hooks = [(module, hook) for module, hook in found if hook is not None]
    away = [(module, hook) for module, hook in hooks if any(p.is_meta for p in module.parameters(recurse=False))]
    for module, hook in away:
        hook.pre_forward(module)
    try:
        yield
        for module, hook in hooks if write else ():
            deep = hook.place_submodules
            tensors = chain(module.named_parameters(recurse=deep), module.named_buffers(recurse=deep))
            hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in tensors}
    finally:
        for module, hook in away:
            hook.post_forward(module, torch.empty(0))
