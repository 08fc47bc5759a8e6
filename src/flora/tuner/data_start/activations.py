"""``init="activations"``: a start from the inputs of the layers. The model runs forward only, without labels or a loss.

The rows of a weight are multiplied by inputs z (the modes but the output mode o): the features of a token, the patch
below a kernel, a one-hot row of an embedding. The factors are to start with the leading eigenvectors of the centred
second moments Σ (z − z̄)(z − z̄)ᵀ, mode by mode, and the core with those of the moments in between.

The layer's own forward is run again with random numbers R in the place of its output's gradient: the gradient of its
weight is D = R Z, random sums of the inputs, whose moments are those of Z in expectation. So one way suits every kind
of layer, with its own padding, groups and dilation, and attention and stacked experts too, whose inputs can't be seen
from outside. Numbers of R that sum to zero over the positions of a batch centre the inputs. A linear layer's D = R Z is
no more than that product, and needs no second run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flora.layers.kinds import output_mode
from flora.layers.weights.parameters import run_with_weights
from flora.layers.weights.sharded import whole
from flora.tuner.data_start.reduction import BASIS, SPARE, Products, Reduction, Start, two_passes
from flora.tuner.layer import FloraLayer

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
    places = _places(model, layers, lambda: run(model, batches[0]))
    sketches = [
        _Sketch(layer, adapter, place, seed + 16 * number, process)
        for number, (layer, place) in enumerate(zip(layers, places, strict=True))
    ]

    def run_batches() -> None:
        hooks = [(sketch.place.called, sketch.take) for sketch in sketches]
        with _hooked(hooks), torch.no_grad():
            for batch in batches:
                run(model, batch)

    return two_passes([sketch.reduction for sketch in sketches], run_batches)


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Place:
    """Where a weight acts: after ``called`` was called, ``module`` is run again, in which ``weight`` is its name."""

    called: nn.Module
    module: nn.Module
    weight: str


def _places(model: nn.Module, layers: Sequence[FloraLayer], run: Callable[[], Any]) -> list[_Place]:
    """The layer itself or, if nothing calls it, the module around it that is called: some only read its weight."""
    modules, called = dict(model.named_modules()), set()
    names = {module: name for name, module in modules.items()}
    with _hooked((module, lambda module, *_: called.add(module)) for module in modules.values()), torch.no_grad():
        run()

    def place(layer: FloraLayer) -> _Place:
        if layer in called:
            return _Place(layer, layer.get_base_layer(), layer.parameter_name)
        name, path = names[layer], f"base_layer.{layer.weight_path}"
        while name and modules[name] not in called:
            name, _, leaf = name.rpartition(".")
            path = f"{leaf}.{path}"
        return _Place(modules[name], modules[name], path)

    return [place(layer) for layer in layers]


class _Sketch:
    """Random sums of one layer's inputs."""

    def __init__(self, layer: FloraLayer, adapter: str, place: _Place, seed: int, process: int) -> None:
        self.layer, self.adapter, self.place, self.busy = layer, adapter, place, False
        rows = layer.weight_shape[output_mode(layer.roles)]
        self.repeats = math.ceil((BASIS * max(layer.space(adapter).ranks) + SPARE) / rows)
        missing = "no batch reaches layer {layer}: it has no inputs to start from"
        self.reduction = Reduction(layer, adapter, seed, "a sum of inputs", missing, self.repeats * rows, SHARE)
        device = layer.base_parameter.device
        self.generator = torch.Generator(device).manual_seed(seed + (process << 32))

    def take(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Hook: add the inputs of one call."""
        if self.busy:  # this is the second run
            return
        if self.place.called is self.layer and Products.suit(self.layer):
            numbers = torch.cat([self._numbers(output) for _ in range(self.repeats)], -1)
            self.reduction.add(Products.of(numbers, self.layer.input_of(args, kwargs)))
            return
        self.busy = True
        try:
            with torch.enable_grad():
                weight, output = self._run_again(args, kwargs)
            y = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad), None)
            sums = [] if y is None else [self._sums(y, weight) for _ in range(self.repeats)]
        finally:
            self.busy = False
        parts = [part for part in sums if part is not None]  # None: this call made no use of the weight
        if parts:
            self.reduction.add(torch.cat(parts, output_mode(self.layer.roles)))

    def _run_again(self, args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
        """The weight that a gradient is taken of, and the output."""
        if self.layer.is_quantized:
            return self.layer.with_zeros(self.layer.input_of(args, kwargs))
        weight, module = whole(self.layer.base_parameter.detach()).requires_grad_(), self.place.module
        sharded = {name: p for name, p in module.named_parameters() if hasattr(p, "full_tensor")}  # by FSDP2, by itself
        weights = {name: whole(p.detach()) for name, p in sharded.items()} | {self.place.weight: weight}
        return weight, run_with_weights(module, weights, args, kwargs)

    def _sums(self, y: Tensor, weight: Tensor) -> Tensor | None:
        """As many random sums of inputs as there are outputs, in the weight's shape."""
        numbers = self._numbers(y).to(y.dtype)
        return torch.autograd.grad(y, weight, numbers, retain_graph=True, allow_unused=True)[0]

    def _numbers(self, y: Tensor) -> Tensor:
        """Random numbers in the place of an output."""
        numbers = torch.randn(y.shape, generator=self.generator, device=y.device, dtype=torch.float32)
        channels = max(0, y.ndim - 1 - self.layer.roles.count("kernel"))
        positions = [mode for mode in range(y.ndim) if mode != channels]
        return numbers - numbers.mean(positions, keepdim=True) if positions else numbers
