"""``init="activations"``: a start from the inputs of the layers, without labels, a loss or a backward pass of the model.

The rows of a weight are multiplied by inputs z (the modes but the output mode o): the features of a token, the patch
below a kernel, a one-hot row of an embedding. The factors are to start with the leading eigenvectors of the centred
second moments Σ (z − z̄)(z − z̄)ᵀ, mode by mode, and the core with those of the moments in between.

The layer's own forward is run again with random numbers R in the place of its output's gradient: the gradient of its
weight is D = R Z, random sums of the centred inputs, and DᵀD is the moments' sketch. So one way suits every kind of
layer, with its own padding, groups and dilation; attention, whose keys and queries act through a softmax, and stacked
experts too. Numbers of R that sum to zero over the positions of a batch centre z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flora.layers.kinds import output_mode
from flora.layers.weights import run_with_weights
from flora.tuner.layer import FloraLayer
from flora.tuner.reduction import BASIS, SPARE, Reduction, Start, two_passes

SHARE = 0.5  # of each rank; the rest stays random, for what the inputs do not show


def from_activations(
    model: nn.Module,
    layers: Sequence[FloraLayer],
    adapter: str,
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    seed: int,
    process: int,
) -> list[Start]:
    """The start of every layer. See ``initialize``. ``process``: its number, for random sums of its own."""
    sketches = [_Sketch(layer, adapter, seed + 16 * number, process) for number, layer in enumerate(layers)]

    def run_batches() -> None:
        handles = [s.layer.register_forward_hook(s.take, with_kwargs=True) for s in sketches]
        try:
            with torch.no_grad():
                for batch in batches:
                    run(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    return two_passes([sketch.reduction for sketch in sketches], run_batches)


class _Sketch:
    """Random sums of one layer's inputs."""

    def __init__(self, layer: FloraLayer, adapter: str, seed: int, process: int) -> None:
        self.layer = layer
        rows = layer.weight_shape[output_mode(layer.roles)]
        self.repeats = math.ceil((BASIS * max(layer.space(adapter).ranks) + SPARE) / rows)
        missing = "no batch reaches layer {layer}: it has no inputs to start from"
        self.reduction = Reduction(layer, adapter, seed, "a sum of inputs", missing, self.repeats * rows, SHARE)
        device = layer.base_parameter.device
        self.generator = torch.Generator(device).manual_seed(seed + (process << 32))

    def take(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Hook: add the inputs of one call."""
        weight = self.layer.base_parameter.detach().requires_grad_()
        with torch.enable_grad():
            output = run_with_weights(self.layer.get_base_layer(), {self.layer.parameter_name: weight}, args, kwargs)
            y = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad), None)
            if y is None:
                return
            sums = [torch.autograd.grad(y, weight, self._random(y), retain_graph=True)[0] for _ in range(self.repeats)]
        self.reduction.add(torch.cat(sums, output_mode(self.layer.roles)))

    def _random(self, y: Tensor) -> Tensor:
        """In the shape of an output, of mean zero over everything but the channels."""
        numbers = torch.randn(y.shape, generator=self.generator, device=y.device, dtype=torch.float32)
        channels = max(0, y.ndim - 1 - self.layer.roles.count("kernel"))
        positions = [mode for mode in range(y.ndim) if mode != channels]
        return (numbers - numbers.mean(positions, keepdim=True) if positions else numbers).to(y.dtype)
