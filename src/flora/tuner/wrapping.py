"""From planned weights to wrapped layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from flora.tuner.adapted_weight import AdaptedWeight
from flora.tuner.config import FloraConfig
from flora.tuner.container import FloraContainer, is_container
from flora.tuner.layer import FloraLayer
from flora.tuner.live import attach
from flora.tuner.peft_compat import get_submodules
from flora.tuner.planning.plan import PlannedWeight
from flora.tuner.planning.targets import unwrapped


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing. nn.TransformerEncoderLayer's fast path reads weights without calling our forward, but
    only while no hook is registered."""


def _pass_no_nested_tensors(model: nn.Module, name: str, layer: FloraLayer) -> None:
    """Without the fast path, the layers of an nn.TransformerEncoder can't take the nested tensors that it makes of a
    batch with a padding mask. Unloading the layer restores its way."""
    parts = name.split(".")
    for n in range(len(parts)):
        outer = unwrapped(model.get_submodule(".".join(parts[:n])))
        if getattr(outer, "use_nested_tensor", False):
            outer.use_nested_tensor = False  # type: ignore[assignment]
            layer.without_nested_tensors.append(outer)


def with_scales_in_use(
    rows: Sequence[PlannedWeight], model: nn.Module, configs: dict[str, FloraConfig], config: FloraConfig
) -> list[PlannedWeight]:
    """The rows with the scales of an adapter that has the same config already. Files and sums bring scales of their
    own, and copies of the parameters alone (TRL's reference model) must come to the same function."""
    twins = [name for name, other in configs.items() if other == config]
    scales: dict[str, float] = {}
    for layer in model.modules():
        if isinstance(layer, FloraLayer):
            for space in (layer.space(name) for name in twins if name in layer.tucker_space):
                if not space.scale.is_meta:
                    scales[layer.name] = space.scale.item()
    return [replace(row, scale=scales.get(row.name, row.scale)) for row in rows]


def wrap_module(model: nn.Module, weights: Sequence[PlannedWeight], adapter_name: str, config: FloraConfig) -> None:
    """Give the weights of one module an adapter: one FloraLayer per weight, the first weight's outermost."""
    parent, layer, name = get_submodules(model, weights[0].module)
    wrapped: dict[str, AdaptedWeight] = {}
    inner = layer
    while hasattr(inner, "base_layer"):
        if isinstance(inner, AdaptedWeight):
            wrapped[inner.parameter_name] = inner
        inner = inner.base_layer
    for weight in reversed(weights):
        if weight.parameter not in wrapped:
            wrapper = FloraContainer if is_container(unwrapped(layer)) else FloraLayer
            layer = wrapped[weight.parameter] = wrapper(layer, weight.site, weight.shape, weight.shared)
            layer.training = layer.base_layer.training
            if isinstance(parent, nn.TransformerEncoderLayer):
                layer.register_forward_pre_hook(_no_fast_path)
                _pass_no_nested_tensors(model, weight.module, layer)
        if adapter_name not in wrapped[weight.parameter].tucker_space:
            try:
                _add(wrapped[weight.parameter], weight, adapter_name, config)
            except ValueError as error:
                raise ValueError(f"layer {weight.name!r} ({weight.layer_type}): {error}") from error
    for alias in weights[0].aliases:
        other, _, leaf = get_submodules(model, alias)
        setattr(unwrapped(other), leaf, layer)
    setattr(unwrapped(parent), name, layer)
    attach(model)


def _add(layer: AdaptedWeight, weight: PlannedWeight, adapter_name: str, config: FloraConfig) -> None:
    """Give a layer a core space, as planned but for its start."""
    auto = weight.scale == "auto"
    number = 1.0 if auto else float(weight.scale)
    layer.update_layer(
        adapter_name, weight.ranks, number, config.dropout, weight.execution, inference_mode=config.inference_mode
    )
    space = layer.space(adapter_name)
    space.init, space.scaled_for = config.init, config.start if auto else None
    space.written_down = config.plan.scales, weight.name
    if not auto:
        space.write_down(number)
