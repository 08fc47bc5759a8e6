"""``flora.initialize``: the data starts, ``init="gradient"`` and ``init="activations"``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flora.layers.weights.sharded import first_alone_loads, has_fsdp, has_master_copy, is_distributed, is_flat
from flora.tuner.data_start.activations import from_activations
from flora.tuner.data_start.batches import as_batches
from flora.tuner.data_start.gradient import from_gradient
from flora.tuner.data_start.guard import at_its_start, undisturbed
from flora.tuner.data_start.loss import loss_of_model, run
from flora.tuner.data_start.reduction import distributed, fill, together
from flora.tuner.layer import FloraLayer
from flora.tuner.starting import suit_scales


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    adapter: str = "default",
    loss: Callable[[nn.Module, Any], Any] | None = None,
    *,
    warmup_steps: int = 20,
    warmup_rate: float = 1e-2,
    overwrite: bool = False,
) -> None:
    """Start the adapter's core spaces from ``batches``, in the way that its config's ``init`` names.

    "activations" needs no labels. It starts from the directions in which the inputs of each layer vary (their centred
    second moments), and leaves half of each rank random. The model only runs forward. Any other ``init``, above all
    "gradient", starts from the gradient of the loss, to which an untrained head gives no direction: whatever else is
    trained (a new head, biases) is first trained for some steps, and put back in the end. ``scale="auto"`` is then that
    of the gradient start.

    The model runs in training mode, as the first step will: dropout and batch normalization act on what a layer gets.
    If it is in training mode already, single modules in evaluation mode stay so. The adapter need not be active; it
    runs then in the place of those that are. Afterwards modes, gradients, buffers, active adapters, and the random
    numbers of Python, NumPy and torch are as before. Weights are taken one at a time. In a distributed run every
    process passes batches of its own, and all get the same start.

    A layer whose gradient is zero over all batches, such as one before a normalization that starts with zeros, starts
    at random; a warning names it.

    Args:
        model: with the adapter in it, not merged.
        batches: some 32 batches of training data; with too few, the directions are chance. A sequence is read several
            times; of any other iterable the first 32 batches are kept in memory.
        adapter: its name.
        loss: ``loss(model, batch)`` -> a tensor with one number; by default the loss that the model returns for
            ``model(**batch)``, where transformers' Trainer looks for it. For "activations" anything that runs the model
            on a batch; by default ``model(**batch)``, or ``model(batch)`` for a tensor.
        warmup_steps, warmup_rate: of AdamW, on the batches in turn, for what is trained beside the adapter. Pass
            ``warmup_steps=0`` if that has learned already, as a language model's ``lm_head`` has.
        overwrite: start even an adapter that has been trained; its numbers are lost.

    Raises:
        ValueError: arguments of another kind; no batch, no labels, no such adapter, a merged or trained one; a loss
            that is not finite (in a run of one process with the first layer whose output is not) or does not depend on
            a layer; a layer that no batch reaches, or whose inputs are not finite; a weight that is offloaded, sharded
            by FSDP1, taken by DeepSpeed, or tensor parallel (for activations); an error of another process. Nothing is
            changed then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its own averaging would miss the parameters that are frozen
    with together():
        _check_options(loss, warmup_steps, warmup_rate)
        layers = _layers_to_start(model, adapter, overwrite)
    with undisturbed(model), at_its_start(model, layers, adapter):
        with together():
            batches = as_batches(batches)
        seed, process = _common_seed()
        kind = "activations" if layers[0].space(adapter).init == "activations" else "gradient"
        if kind == "activations":
            starts = from_activations(model, layers, adapter, batches, loss or run, seed, process)
        else:
            warmup = warmup_steps, warmup_rate
            starts = from_gradient(model, layers, adapter, batches, loss or loss_of_model, seed, *warmup)
    for layer, (rows, factors) in zip(layers, starts, strict=True):
        fill(layer, adapter, rows, factors)
        layer.space(adapter).started = True
    suit_scales(layers, adapter, kind)


def _check_options(loss: Any, warmup_steps: Any, warmup_rate: Any) -> None:
    if loss is not None and not callable(loss):
        raise ValueError(f"loss is a {type(loss).__name__}: expected a function of the model and a batch")
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps!r}: expected a whole number, at least 0")
    if not isinstance(warmup_rate, (int, float)) or not 0 <= warmup_rate < math.inf:
        raise ValueError(f"warmup_rate is {warmup_rate!r}: expected a number, at least 0")


def _layers_to_start(model: nn.Module, adapter: str, overwrite: bool) -> list[FloraLayer]:
    layers = [m for m in model.modules() if isinstance(m, FloraLayer) and adapter in m.tucker_space]
    if not layers:
        raise ValueError(f"the model has no FLoRA adapter {adapter!r}")
    if first_alone_loads() and not has_fsdp(model):
        raise ValueError(
            "only the first process has loaded the model's weights (fsdp_cpu_ram_efficient_loading): initialize after "
            "FSDP2 has sharded the model, or load it in all processes"
        )
    for layer in layers:
        space = layer.space(adapter)
        if layer.merged:
            raise ValueError(f"adapter {adapter!r}: unmerge before initializing")
        if space.stack is not None:
            raise ValueError(f"layer {layer.name!r} shares factors (stack): a data start needs layers that share none")
        if has_master_copy(space.core):
            raise ValueError(
                f"layer {layer.name!r}: DeepSpeed's optimizer has a copy of its core, which the next step would put "
                "back; initialize before the model is wrapped"
            )
        if space.init == "activations" and is_distributed(layer.base_parameter) and not has_fsdp(model):
            raise ValueError(
                f"layer {layer.name!r} is tensor parallel: init='gradient' can start it, got init='activations'"
            )
        whole = not is_flat(layer.base_parameter, layer.weight_shape)
        if not whole or tuple(space.core.shape) != space.ranks or not isinstance(space.core, nn.Parameter):
            raise ValueError(
                f"layer {layer.name!r}: its {'core' if whole else 'weight'} is not whole, since the model is sharded "
                "(FSDP1, ZeRO-3); initialize before the model is wrapped, and load it without zero.Init"
            )
        if layer.base_parameter.is_meta:
            raise ValueError(f"layer {layer.name!r} has no numbers in memory (offloaded?): a data start needs them")
        if layer.is_quantized and layer.kind.plain is None:
            raise ValueError(
                f"layer {layer.name!r} keeps its weight quantized: no data start is known for its kind, {layer.kind}"
            )
        if not overwrite and space.has_update:
            raise ValueError(
                f"adapter {adapter!r} has been trained: the update of layer {layer.name!r} is not zero. To train on, "
                "leave out flora.initialize, or the Trainer's callback flora.Initialize; overwrite=True starts the "
                "adapter anew, and its numbers are lost"
            )
    return layers


def _common_seed() -> tuple[int, int]:
    """A random seed that all processes share, and this process's number."""
    seed = [int(torch.randint(1 << 31, ()))]
    if distributed():
        dist.broadcast_object_list(seed)
        return seed[0], dist.get_rank()
    return seed[0], 0
