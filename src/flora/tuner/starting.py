"""The scales and the starts of an adapter, for all its layers at once: the host waits for the device once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flora.layers.core_space import CoreSpace, Stack
from flora.layers.kinds import RAW, output_mode
from flora.layers.starts import rms, sample, start, unified_scale
from flora.layers.weights.offload import loaded
from flora.layers.weights.sharded import gathered, of_first_process, whole
from flora.tuner.config import FloraConfig
from flora.tuner.layer import FloraLayer


def start_adapter(model: nn.Module, adapter: str, config: FloraConfig) -> None:
    """Fill an adapter's new core spaces, and let those of a stack share factors.

    Raises ValueError if ``scale="auto"`` needs a weight that has no numbers.
    """
    found = (layer for layer in model.modules() if isinstance(layer, FloraLayer) and adapter in layer.tucker_space)
    layers = {layer: layer.space(adapter) for layer in found}
    new = {layer: space for layer, space in layers.items() if space.is_new}
    set_scales([layer for layer, space in new.items() if space.scaled_for is not None], adapter)
    start(list(new.values()), config.start, [output_mode(layer.roles) for layer in new])
    for layer, space in new.items():
        layer.kind.after_start(layer.get_base_layer(), space)
    _stack({layer.name: space for layer, space in layers.items()}, config)


def suit_scales(layers: Sequence[FloraLayer], adapter: str, init: str) -> None:
    """Under ``scale="auto"`` set the scales for the start ``init``, which the adapter has now."""
    others = [layer for layer in layers if layer.space(adapter).scaled_for not in (None, init)]
    for layer in others:
        layer.space(adapter).scaled_for = init
    set_scales(others, adapter)


@torch.no_grad()
def set_scales(layers: Sequence[FloraLayer], adapter: str) -> None:
    """Set the scales to those of ``scale="auto"`` for the starts that the spaces are ``scaled_for``."""
    if not layers:
        return
    spaces = [layer.space(adapter) for layer in layers]
    numbers = of_first_process(
        [
            unified_scale(size, space.shape, space.ranks, output_mode(layer.roles), str(space.scaled_for))
            for size, layer, space in zip(rms([_sample(layer) for layer in layers]), layers, spaces, strict=True)
        ]
    )
    scales = [space.scale for space in spaces]
    torch._foreach_zero_(scales)
    torch._foreach_add_(scales, numbers)
    for space, number in zip(spaces, numbers, strict=True):
        space.write_down(number)


def _sample(layer: FloraLayer) -> Tensor:
    """Of the weight without any update; a copy if the whole weight is here only while it is looked at."""
    if layer.is_whole([]) and not layer.merged:
        return sample(layer.base_parameter)
    try:
        with loaded(layer.get_base_layer()), gathered([layer.base_parameter]):
            if layer.base_parameter.is_meta:
                raise ValueError('scale="auto" needs the numbers of a weight, and this one is on the meta device')
            return sample(whole(layer.frozen_weight)).clone()
    except ValueError as error:
        what = RAW.name if layer.kind is RAW else type(layer.get_base_layer()).__name__
        raise ValueError(f"layer {layer.name!r} ({what}): {error}") from error


def _stack(spaces: dict[str, CoreSpace], config: FloraConfig) -> None:
    """Let the core spaces, by their layers' names, share factors as planned."""
    stacks: dict[str, list[CoreSpace]] = defaultdict(list)
    for row in config.plan.rows:
        if row.name in spaces:  # a state_dict may name fewer layers than the config
            stacks[row.factors_of or row.name].append(spaces[row.name])
    for own in stacks.values():
        if len(own) > 1:
            Stack(own)
