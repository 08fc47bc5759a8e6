"""``flora.initialize``: the data starts, ``init="gradient"`` and ``init="activations"``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flora.layers.weights.sharded import first_alone_loads, has_fsdp, has_master_copy, is_distributed, is_flat
from flora.tuner.data_start.activations import from_activations
from flora.tuner.data_start.gradient import from_gradient
from flora.tuner.data_start.reduction import distributed, fill, together
from flora.tuner.layer import FloraLayer


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
    Its mode, gradients, running statistics and the state of the random numbers are as before afterwards. Weights are
    taken one at a time. In a distributed run every process passes batches of its own, and all get the same start.

    Args:
        model: with the adapter in it, not merged.
        batches: some 32 batches of training data; with too few, the directions are chance. A sequence is read several
            times; of any other iterable all batches are kept in memory.
        adapter: its name.
        loss: ``loss(model, batch)`` -> scalar; by default ``model(**batch).loss``. For "activations" anything that runs
            the model on a batch; by default ``model(**batch)``, or ``model(batch)`` for a tensor.
        warmup_steps, warmup_rate: of AdamW, on the batches in turn, for what is trained beside the adapter.
        overwrite: start even an adapter that has been trained; its numbers are lost.

    Raises:
        ValueError: no batch, no labels, no such adapter, a merged or trained one; a loss that is not finite or does not
            depend on a layer; a layer that no batch reaches, or whose inputs are not finite; a weight that is
            offloaded, sharded by FSDP1, taken by DeepSpeed, or tensor parallel (for activations); an error of another
            process. Nothing is changed then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its own averaging would miss the parameters that are frozen
    with together():
        layers = _layers_to_start(model, adapter, overwrite)
        batches = batches if isinstance(batches, Sequence) else list(batches)
        if not batches:
            raise ValueError("no batches were given; a data start needs some")
    with undisturbed(model), _counted_as_started(layers, adapter):
        seed, process = _common_seed()
        kind = "activations" if layers[0].space(adapter).init == "activations" else "gradient"
        if kind == "activations":
            starts = from_activations(model, layers, adapter, batches, loss or _run, seed, process)
        else:
            starts = from_gradient(model, layers, adapter, batches, loss or _its_loss, seed, warmup_steps, warmup_rate)
    for layer, (rows, factors) in zip(layers, starts, strict=True):
        fill(layer, adapter, rows, factors)
        layer.suit_scale(adapter, kind)


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
        if not overwrite and space.core.any() and all(factor.any() for factor in space.factors):
            raise ValueError(
                f"adapter {adapter!r} has been trained: the update of layer {layer.name!r} is not zero; "
                "pass overwrite=True to start it anew"
            )
    return layers


def _common_seed() -> tuple[int, int]:
    """A random seed that all processes share, and this process's number."""
    seed = [int(torch.randint(1 << 31, ()))]
    if distributed():
        dist.broadcast_object_list(seed)
        return seed[0], dist.get_rank()
    return seed[0], 0


def _its_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = model(**_keywords(batch)).loss
    if loss is None:
        raise ValueError(f"the model returns no loss: the batch has {sorted(batch)}, and needs labels (or pass loss=)")
    return loss


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    else:
        model(**_keywords(batch))


def _keywords(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a {type(batch).__name__}, not a dict of the model's arguments: pass loss=")
    return batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode. Afterwards its modes, buffers, flags and gradients, and the state of the random
    numbers, are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = {parameter.device.index for parameter, _, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device for device in devices if device is not None)):
        try:
            model.train()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter, flag, gradient in flags:
                parameter.requires_grad_(flag)
                parameter.grad = gradient


@contextmanager
def _counted_as_started(layers: Sequence[FloraLayer], adapter: str) -> Iterator[None]:
    """From now on, unless an error ends it."""
    before = [(layer.space(adapter), layer.space(adapter).started) for layer in layers]
    try:
        for space, _ in before:
            space.started = True
        yield
    except BaseException:
        for space, started in before:
            space.started = started
        raise
