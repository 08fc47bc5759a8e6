"""STORAGES: the one list of ways in which a layer keeps a weight other than as a plain tensor.

A row knows a storage by the classes of the layer and of the tensor, and says how the weight that the layer computes
with comes out of it. No library that a row names is imported before a layer of it is met.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flora.layers.weights import packing
from flora.layers.weights.parameters import leaf, owner, parameter_of, shape_of

# classes that compute what a torch class does, with a weight that they quantize; for the rows of ``kinds.KINDS``
LINEAR = (
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear",
    "hqq.core.quantize.HQQLinear",
    "optimum.quanto.nn.qlinear.QLinear",
    "transformers.integrations.finegrained_fp8.FP8Linear",
)
CONV = ("optimum.quanto.nn.qconv2d.QConv2d",)
EMBEDDING = (
    "bitsandbytes.nn.modules.Embedding4bit",
    "bitsandbytes.nn.modules.Embedding8bit",
    "transformers.integrations.finegrained_fp8.FP8Embedding",
)

Layer = Any  # a module whose class belongs to a library that may be missing


@dataclass(frozen=True, eq=False)
class Storage:
    """One way to keep a weight.

    Args:
        name: its name in messages.
        holds: (layer, its parameter or None) -> whether the layer keeps the parameter so.
        dense: (layer, tensor) -> the weight that the layer computes with, a new tensor of its logical shape.
        dtype: (layer, tensor) -> the type of number that an update beside the layer computes in.
        pack: puts a dense weight into the layer (see ``packing``); None if no program here can.
        state: the layer's attributes that ``pack`` replaces, beside the parameter.
        tensor: the attribute of the layer with the numbers, if that is not the parameter.
    """

    name: str
    holds: Callable[[Layer, Any], bool]
    dense: Callable[[Layer, Any], Tensor]
    dtype: Callable[[Layer, Any], torch.dtype]
    pack: Callable[[Layer, str, Tensor], None] | None = None
    state: tuple[str, ...] = ()
    tensor: str | None = None


def storage_of(layer: nn.Module, weight: str) -> Storage | None:
    """The row of a layer's weight; None for a plain tensor."""
    holder, parameter = owner(layer, weight), parameter_of(layer, weight)
    # asked several times for each layer of a model: most are seen to be in no row at once
    wide = parameter is None or (type(parameter) is nn.Parameter and parameter.dtype.itemsize > 1)
    if wide and type(holder).__module__.startswith("torch.nn."):
        return None
    return next((storage for storage in STORAGES if storage.holds(holder, parameter)), None)


def tensor_of(layer: nn.Module, weight: str) -> Any:
    """The tensor that keeps a layer's weight. Only a plain one has the weight's shape and type."""
    storage = storage_of(layer, weight) if parameter_of(layer, weight) is None else None
    # not get_parameter: FSDP1 puts plain views of its flat parameter in their place
    return getattr(owner(layer, weight), (storage and storage.tensor) or leaf(weight))


@torch.no_grad()
def dense_of(layer: nn.Module, weight: str) -> Tensor:
    """The weight that the layer computes with, (I_1, …, I_N)."""
    storage, tensor = storage_of(layer, weight), tensor_of(layer, weight)
    return tensor if storage is None else storage.dense(owner(layer, weight), tensor)


def dtype_of(layer: nn.Module, weight: str) -> torch.dtype:
    """The type of number that an update of the weight computes in."""
    storage, tensor = storage_of(layer, weight), tensor_of(layer, weight)
    return tensor.dtype if storage is None else storage.dtype(owner(layer, weight), tensor)


def logical_shape(layer: Layer, weight: str) -> tuple[int, ...]:
    """A kept weight's shape, also where the tensor that keeps it is packed."""
    parameter = parameter_of(layer, weight)
    if parameter is not None and parameter.dtype.is_floating_point:
        return shape_of(parameter)
    if hasattr(layer, "num_embeddings"):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


@torch.no_grad()
def pack(layer: nn.Module, weight: str, dense: Tensor) -> None:
    """Put a dense weight into the layer, in the form that the layer keeps."""
    storage = storage_of(layer, weight)
    if storage is None or storage.pack is None:
        raise ValueError("no form to pack into")
    storage.pack(owner(layer, weight), storage.tensor or leaf(weight), dense)


def kept_state(layer: nn.Module, weight: str) -> dict[str, Any]:
    """What ``pack`` replaces: attributes of the module that holds the weight."""
    storage, holder = storage_of(layer, weight), owner(layer, weight)
    names = (storage.tensor or leaf(weight), *storage.state) if storage is not None else (leaf(weight),)
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}


def put_back(layer: nn.Module, weight: str, state: dict[str, Any]) -> None:
    """Undo ``pack``, to the bit: ``state`` is what ``kept_state`` returned before."""
    holder = owner(layer, weight)
    for name, value in state.items():
        setattr(holder, name, value)


def dense_before(layer: nn.Module, weight: str, state: dict[str, Any]) -> Tensor:
    """The dense weight of an earlier ``kept_state``."""
    now = kept_state(layer, weight)
    put_back(layer, weight, state)
    try:
        return dense_of(layer, weight)
    finally:
        put_back(layer, weight, now)


# ------------------------------------------------------------------------------------------------------ recognition


@cache
def _inherits(cls: Any, start: str) -> bool:
    """Whether the dotted name of the class, or of one that it inherits from, starts so."""
    return any(f"{each.__module__}.{each.__qualname__}".startswith(start) for each in cls.__mro__)


def _is_a(thing: Any, start: str) -> bool:
    cls: Any = type(thing)
    return _inherits(cls, start)


def _tensor_is(start: str) -> Callable[[Layer, Any], bool]:
    return lambda layer, parameter: parameter is not None and _is_a(parameter, start)


def _layer_is(start: str) -> Callable[[Layer, Any], bool]:
    """For layers that have no parameter where the weight belongs."""
    return lambda layer, parameter: parameter is None and _is_a(layer, start)


def _is_packable_torchao(layer: Layer, parameter: Any) -> bool:
    return type(parameter).__name__ in packing.TORCHAO and _is_a(parameter, "torchao.")


def _is_quanto(layer: Layer, parameter: Any) -> bool:
    mine = parameter is not None and _is_a(layer, "optimum.quanto.nn.")
    return mine and layer.weight_qtype is not None and parameter is layer.weight


def _is_float8(layer: Layer, parameter: Any) -> bool:
    return parameter is not None and parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1


def _is_scaled_float8(layer: Layer, parameter: Any) -> bool:
    return _is_float8(layer, parameter) and (hasattr(layer, "weight_scale_inv") or hasattr(layer, "weight_scale"))


# ------------------------------------------------------------------------------------------------------ dense weights


def _bnb_4bit(layer: Layer, weight: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = weight.data, weight.quant_state
    if state is None:
        raise ValueError("the weight is not quantized yet: move the layer to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        # a forward without gradients leaves it so on some CPUs; bitsandbytes' own inverse forgets to turn absmax back
        state = copy.copy(state)
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.mT.reshape(-1).float()
    return functional.dequantize_4bit(data, state)


def _bnb_8bit(layer: Layer, weight: Any) -> Tensor:
    state = getattr(layer, "state", None)  # from the first forward on; embeddings have none
    rows = weight.SCB if state is None or state.SCB is None else state.SCB
    if rows is None:
        raise ValueError("the weight is not quantized yet: move the layer to its device first")
    return weight.data * (rows.float() / 127).unsqueeze(1)


def _torchao(layer: Layer, weight: Any) -> Tensor:
    try:
        dense = weight.dequantize()
    except NotImplementedError:
        return _of_units(layer, weight)
    inputs = getattr(weight, "act_pre_scale", None)  # the layer multiplies its input by it
    return dense if inputs is None else dense * inputs


def _quanto(layer: Layer, weight: Any) -> Tensor:
    return layer.qweight.dequantize()  # also while the weight is not frozen, and quantized at each forward


def _hqq(layer: Layer, weight: Any) -> Tensor:
    return layer.dequantize()


def _of_units(layer: Layer, weight: Any) -> Tensor:
    """By what the layer makes of unit vectors, for kernels that keep the weight in an order of their own."""
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float16
    units = torch.eye(layer.in_features + 1, layer.in_features, device=weight.device, dtype=dtype)
    answers = layer(units).float()
    return (answers[:-1] - answers[-1]).mT  # the last is the bias


def _scaled_float8(layer: Layer, weight: Any) -> Tensor:
    """transformers' FP8 layers: one scale for the weight, or one for each of its blocks."""
    scale = (layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale).float()
    if scale.numel() > 1:
        for mode, block in enumerate(layer.block_size):
            scale = scale.repeat_interleave(block, mode).narrow(mode, 0, weight.shape[mode])
    return weight.float() * scale


def _float8(layer: Layer, weight: Any) -> Tensor:
    return weight.to(_casting_dtype(layer, weight))


# -------------------------------------------------------------------------------------------------- types of number


def _float32(layer: Layer, weight: Any) -> torch.dtype:
    return torch.float32


def _own_dtype(layer: Layer, weight: Any) -> torch.dtype:
    return weight.dtype


def _compute_dtype(layer: Layer, weight: Any) -> torch.dtype:
    return getattr(layer, "compute_dtype", None) or torch.float32


def _casting_dtype(layer: Layer, weight: Any) -> torch.dtype:
    """What diffusers' layerwise casting computes in."""
    hooks = getattr(layer, "_diffusers_hook", None)
    casting = hooks and hooks.get_hook("layerwise_casting")
    return casting.compute_dtype if casting else torch.float32


STORAGES = (
    Storage(
        "bitsandbytes 4-bit", _tensor_is("bitsandbytes.nn.modules.Params4bit"), _bnb_4bit, _compute_dtype,
        pack=packing.bnb_4bit, state=("quant_state",),
    ),
    Storage(
        "bitsandbytes 8-bit", _tensor_is("bitsandbytes.nn.modules.Int8Params"), _bnb_8bit, _float32,
        pack=packing.bnb_8bit, state=("state",),
    ),
    Storage("torchao", _is_packable_torchao, _torchao, _own_dtype, pack=packing.torchao),
    Storage("torchao's types for other devices", _tensor_is("torchao."), _torchao, _own_dtype),
    Storage("optimum-quanto", _is_quanto, _quanto, _own_dtype, pack=packing.quanto),
    Storage(
        "HQQ", _layer_is("hqq.core.quantize.HQQLinear"), _hqq, _compute_dtype,
        pack=packing.hqq, state=("meta",), tensor="W_q",
    ),
    Storage("GPTQ or AWQ", _layer_is("gptqmodel.nn_modules.qlinear."), _of_units, _float32, tensor="qweight"),
    Storage(
        "scaled float8", _is_scaled_float8, _scaled_float8, _float32,
        pack=packing.scaled_float8, state=("weight_scale_inv", "weight_scale"),
    ),
    Storage("float8", _is_float8, _float8, _casting_dtype, pack=packing.float8),
)  # fmt: skip
