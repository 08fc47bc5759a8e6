"""What a data start borrows from a model, and gives back: everything but the numbers of the adapter that it starts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from flora.layers.kinds import output_mode
from flora.tuner.layer import FloraLayer
from flora.tuner.model import FloraModel
from flora.tuner.peft_compat import AuxiliaryTrainingWrapper, BaseTunerLayer, set_auxiliary_adapter


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in training mode, has no gradients and records them, whatever the caller's mode.
    Afterwards its modes, buffers, gradients and flags, its active adapters, and the state of the random numbers of
    Python, NumPy and torch are as before.

    A model that is in training mode already keeps single modules in evaluation mode, such as a frozen BatchNorm.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    tuners = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = [(tuner, tuner._active_adapter, tuner._disable_adapters) for tuner in tuners]
    buffers = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    numbers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = {parameter.device.index for parameter, *_ in parameters if parameter.device.type == "cuda"}
    with _same_random_numbers(sorted(device for device in devices if device is not None)):
        try:
            # what PEFT adds is in training mode even if the model is not
            if not any(tuner.get_base_layer().training for tuner in tuners if isinstance(tuner, BaseTunerLayer)):
                model.train()
            for parameter, *_ in parameters:
                parameter.grad = None
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            for tuner, names, disabled in active:
                tuner._active_adapter, tuner._disable_adapters = names, disabled
            for module, name, buffer in buffers:
                if module._buffers.get(name) is not buffer:  # the forward assigned another
                    setattr(module, name, buffer)
            with torch.no_grad():
                for buffer, before in numbers:
                    buffer.copy_(before)
            for parameter, flag, gradient in parameters:
                parameter.requires_grad_(flag)
                parameter.grad = gradient


@contextmanager
def _same_random_numbers(devices: Sequence[int]) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def at_its_start(model: nn.Module, layers: Sequence[FloraLayer], adapter: str) -> Iterator[None]:
    """Within ``undisturbed``: the adapter runs, in the place of others if it did not run before; its update is zero,
    and no warning says that it has not been started. An error puts its numbers back."""
    if not all(adapter in layer.active_adapters and not layer.disable_adapters for layer in layers):
        _activate(model, adapter)
    models = [(module, module.start_checked) for module in model.modules() if isinstance(module, FloraModel)]
    factors = [layer.space(adapter).factors[output_mode(layer.roles)].detach() for layer in layers]
    before = [factor.clone() if factor.any() else None for factor in factors]  # most are zero: together they are large
    try:
        for module, _ in models:
            module.start_checked = tuple(module.peft_config)
        for factor in factors:
            factor.zero_()
        yield
    except BaseException:
        for factor, numbers in zip(factors, before, strict=True):
            factor.zero_() if numbers is None else factor.copy_(numbers)
        raise
    finally:
        for module, checked in models:
            module.start_checked = checked


def _activate(model: nn.Module, adapter: str) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([adapter])
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module._disable_adapters = False
    set_auxiliary_adapter(model, adapter)
