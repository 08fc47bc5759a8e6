"""What every method gets (`Request`) and returns (`AdaptedModel`), and which weights it can adapt (`Limits`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from flora.layers.weights.storage import logical_shape, storage_of
from flora.tuner.config import FloraConfig
from flora.tuner.planning.targets import find_targets
from flora_lab.tasks.models.pretrained import brief

SHOWN = 4  # names in a note


class CannotAdapt(ValueError):
    """The method does not support this model, or the budget is too small for it; the message says why."""


@dataclass(frozen=True)
class AdaptedModel:
    """A model set up for training.

    Attributes:
        model: the model to train; its forward takes the base model's keyword arguments.
        notes: for the reader: first the rank or width, then each group of targets left out, with the reason.
        callbacks: Trainer callbacks that the method needs during training.
        start: to call before training with a few batches on the model's device; None where the method needs no data.
        optimizer: makes the optimizer from the Trainer's arguments; None: AdamW with one learning rate.
        parameters: size of the adapter. None: `adapt` counts the trainable parameters, without the head's.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    start: Callable[[Iterable[dict]], None] | None = None
    optimizer: Callable[[TrainingArguments], Optimizer] | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Limits:
    """What an implementation can adapt, train and merge.

    Attributes:
        layers: supported layer classes.
        ignored: attributes of a convolution that the implementation drops; it supports only their default values.
        parameters: whether it supports raw parameters.
    """

    layers: tuple[type[nn.Module], ...]
    ignored: tuple[str, ...] = ()
    parameters: bool = False

    def reason(self, layer: nn.Module) -> str | None:
        """Why the implementation does not support this layer; None if it does."""
        if not isinstance(layer, self.layers):
            return type(layer).__name__
        if isinstance(layer, nn.MultiheadAttention) and not layer._qkv_same_embed_dim:
            return "MultiheadAttention with its own widths for key and value"
        if isinstance(layer, nn.modules.conv._ConvNd):
            default = {"groups": 1, "dilation": (1,) * len(layer.kernel_size), "padding_mode": "zeros"}
            for name in self.ignored:
                if getattr(layer, name) != default[name]:
                    return f"{type(layer).__name__} with {name} other than {default[name]}"
        return None


@dataclass(frozen=True)
class Selection:
    """The targets that a method supports: layers and raw parameters by name, and notes about the other targets."""

    layers: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    notes: list[str]

    def __str__(self) -> str:
        counts = {"layers": len(self.layers), "raw parameters": len(self.parameters)}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    @property
    def transposed(self) -> bool:
        """Whether weights are (in, out): those of transformers' Conv1D."""
        return any(isinstance(layer, Conv1D) for layer in self.layers.values())

    def full_rank(self, modes: Sequence[int] = (0,)) -> int:
        """The largest rank of any weight, unfolded along any of ``modes``; a higher rank adds nothing.

        Of a stack of matrices, such as experts, each matrix has its own rank.
        """
        shapes = [weight_shape(layer) for layer in self.layers.values()]
        shapes += [parameter.shape[-2:] for parameter in self.parameters.values()]
        return max(min(shape[mode], math.prod(shape) // shape[mode]) for shape in shapes for mode in modes)


@dataclass(frozen=True)
class Request:
    """The arguments of `adapt` that a method needs."""

    model: nn.Module
    head: list[str]
    budget: int
    steps: int
    target_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None

    def on_meta(self) -> Request:
        """The same for a copy of the model on the meta device, for counting; where a layer packs its weight, the copy
        has a plain layer of the same widths."""
        copied = share_weights(self.model, on_meta)
        for name, module in self.model.named_modules():
            if _is_quantized(module) and (plain := _plain(module)):
                copied.set_submodule(name, plain)
        return replace(self, model=copied)

    def train_head_only(self) -> None:
        self.model.requires_grad_(False)
        for name in self.head:
            self.model.get_submodule(name).requires_grad_(True)

    def select(self, limits: Limits, target_modules: Any = None, target_parameters: Any = None) -> Selection:
        """The targets that ``limits`` allow; the arguments, if given, replace the request's own targets.

        Raises:
            CannotAdapt: no target is supported.
            ValueError: a name or pattern matches nothing.
        """
        target_modules = target_modules or self.target_modules
        target_parameters = target_parameters or self.target_parameters
        config = FloraConfig(
            target_modules=target_modules, target_parameters=target_parameters, modules_to_save=self.head
        )
        targets = find_targets(self.model, config)
        if not targets:
            raise ValueError(
                f"target_modules={target_modules!r}, target_parameters={target_parameters!r}: no weight matches"
            )
        left_out: dict[str, dict[str, None]] = {}  # reason -> names, each once
        selection = Selection({}, {}, [])
        for target in targets:
            name, reason = target.module, limits.reason(target.layer)
            if target.raw:
                name, reason = target.name, None if limits.parameters else "raw parameter"
            if reason:
                left_out.setdefault(reason, {})[name] = None
            elif target.raw:
                selection.parameters[name] = target.weight
            else:
                selection.layers[name] = target.layer
        if not selection.layers and not selection.parameters:
            count = sum(map(len, left_out.values()))
            raise CannotAdapt(f"it does not support any of the {count} targets: {', '.join(left_out)}")
        selection.notes.extend(f"left out, {reason}: {shortened([*names])}" for reason, names in left_out.items())
        return selection


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Of the weight that the layer computes with, which may be quantized; of attention, of the packed projections."""
    name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    return tuple(logical_shape(layer, name))


def built(build: Callable[[Request], AdaptedModel], request: Request) -> AdaptedModel:
    """What ``build`` makes of the request.

    Raises CannotAdapt for an error that ``build`` raises on quantized weights and would not on plain ones: methods have
    many, and none is a mistake in their options.
    """
    if not is_quantized(request.model):
        return build(request)
    plain = request.on_meta()  # before the model is changed
    try:
        return build(request)
    except CannotAdapt:
        raise
    except Exception as error:  # of third parties' code
        try:
            with torch.device("meta"):
                build(plain)
        except Exception:
            raise error from None
        raise CannotAdapt(f"it fails on quantized weights: {brief(error)}") from error


def is_quantized(model: nn.Module) -> bool:
    """Whether some layers keep their weights in another form than plain numbers."""
    return any(_is_quantized(module) for module in model.modules())


def _is_quantized(layer: nn.Module) -> bool:
    return storage_of(layer, "weight") is not None


def refuse_quantized(model: nn.Module) -> None:
    """Raise CannotAdapt for a method that changes weights of the model itself."""
    if is_quantized(model):
        raise CannotAdapt("it changes the model's weights, which are quantized")


def _plain(layer: Any) -> nn.Module | None:
    """A layer of torch with the widths of a quantized one, on the meta device; None for a kind that isn't packed."""
    with torch.device("meta"):
        if hasattr(layer, "num_embeddings"):
            return nn.Embedding(layer.num_embeddings, layer.embedding_dim)
        if hasattr(layer, "in_features"):
            return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    return None


def shortened(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def trainable(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def head_parameters(model: nn.Module, head: Iterable[str]) -> int:
    """Number of parameters of the modules that ``head`` names."""
    return sum(p.numel() for name in head for p in model.get_submodule(name).parameters())


def share_weights(model: nn.Module, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy of the model's modules around the same parameters and buffers, or around ``convert`` of each."""
    return copy.deepcopy(model, {id(t): convert(t) for t in (*model.parameters(), *model.buffers())})


def on_meta(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=False)
    vars(parameter).update(vars(tensor))  # how a quantized one is packed
    return parameter
