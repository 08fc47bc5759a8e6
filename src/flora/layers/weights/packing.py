"""How a dense weight goes back into its layer in the form that the layer keeps (``storage.STORAGES``).

A packer takes (layer, name of the parameter, dense weight) and gives the layer new objects: the old ones stay as they
are, so that they can be put back to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

Layer = Any  # a module whose class belongs to a library that may be missing


def bnb_4bit(layer: Layer, name: str, dense: Tensor) -> None:
    """bitsandbytes' nf4 and fp4, with the block size and the nesting that the layer has."""
    old = getattr(layer, name)
    options = {key: getattr(old, key) for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    number = getattr(old.quant_state, "original_dtype", old.quant_state.dtype)  # its kernel for CPUs makes it bfloat16
    new = type(old)(dense.to("cpu", number), requires_grad=False, module=layer, **options)
    setattr(layer, name, new.to(old.device))


def bnb_8bit(layer: Layer, name: str, dense: Tensor) -> None:
    """bitsandbytes' int8, one scale for each row."""
    old = getattr(layer, name)
    new = type(old)(dense.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False)
    setattr(layer, name, new.to(old.device))
    if hasattr(layer, "state"):  # the next forward takes the numbers over into it
        layer.state = copy.copy(layer.state)
        layer.state.CB = layer.state.SCB = None


def torchao(layer: Layer, name: str, dense: Tensor) -> None:
    """torchao's int8, float8 and intx, with the blocks and the treatment of inputs that the weight has."""
    old = getattr(layer, name)
    new = TORCHAO[type(old).__name__](old, dense.to(old.device, old.dtype))
    setattr(layer, name, nn.Parameter(new, requires_grad=False))


def _granularity(old: Any) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    if tuple(old.block_size) == tuple(old.shape):
        return PerTensor()
    return PerRow() if old.block_size[-1] == old.shape[-1] else PerGroup(old.block_size[-1])


def _mapping(old: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    asymmetric = old.zero_point is not None and bool(old.zero_point.any())
    return MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC


def _int8(old: Any, dense: Tensor) -> Tensor:
    kept = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    options = {key: getattr(old, key) for key in kept}
    dense = dense if old.act_pre_scale is None else dense / old.act_pre_scale
    return type(old).from_hp(dense, _granularity(old), mapping_type=_mapping(old), **options)


def _float8(old: Any, dense: Tensor) -> Tensor:
    options = {key: getattr(old, key) for key in ("mm_config", "kernel_preference", "act_quant_kwargs")}
    return type(old).from_hp(dense, float8_dtype=old.qdata.dtype, granularity=_granularity(old), **options)


def _intx(old: Any, dense: Tensor) -> Tensor:
    options = {"mapping_type": _mapping(old), "activation_quantization": old.activation_quantization}
    return type(old).from_hp(dense, old.block_size, old.target_dtype, **options)


TORCHAO = {"Int8Tensor": _int8, "Float8Tensor": _float8, "IntxUnpackedToInt8Tensor": _intx}


def quanto(layer: Layer, name: str, dense: Tensor) -> None:
    """optimum-quanto, as its layer quantizes a fresh weight."""
    old = getattr(layer, name)
    frozen = layer.frozen
    setattr(layer, name, nn.Parameter(dense.to(old.device, old.dtype), requires_grad=False))
    if frozen:
        layer.freeze()
        layer.weight.requires_grad_(False)


def hqq(layer: Layer, name: str, dense: Tensor) -> None:
    """HQQ, by its own optimization with the layer's settings."""
    config = copy.deepcopy(layer.quant_config)
    settings = {**copy.deepcopy(config), "offload_meta": layer.offload_meta}
    new = type(layer)(None, settings, compute_dtype=layer.compute_dtype, device=layer.device)
    new.quantize(dense.to(layer.device, layer.compute_dtype), **config)
    layer.W_q, layer.meta = new.W_q, new.meta


def scaled_float8(layer: Layer, name: str, dense: Tensor) -> None:
    """transformers' FP8 layers: every block fills the range of its numbers."""
    old, scales = getattr(layer, name), "weight_scale_inv" if hasattr(layer, "weight_scale_inv") else "weight_scale"
    scale = getattr(layer, scales)
    rows, columns = layer.block_size if scale.numel() > 1 else old.shape
    padded = nn.functional.pad(dense.float(), (0, -old.shape[1] % columns, 0, -old.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # (b, rows, c, columns)
    peaks = blocks.abs().amax((1, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    sizes = (peaks / torch.finfo(old.dtype).max).reshape(scale.shape).to(scale.dtype)
    codes = blocks / sizes.float().reshape(peaks.shape)[:, None, :, None]
    codes = codes.flatten(2).flatten(0, 1)[: old.shape[0], : old.shape[1]]
    limit = torch.finfo(old.dtype).max
    setattr(layer, name, nn.Parameter(codes.clamp(-limit, limit).to(old.dtype), requires_grad=False))
    setattr(layer, scales, nn.Parameter(sizes, requires_grad=scale.requires_grad))


def float8(layer: Layer, name: str, dense: Tensor) -> None:
    """Numbers that are only stored as float8."""
    old, limit = getattr(layer, name), torch.finfo(getattr(layer, name).dtype).max
    setattr(layer, name, nn.Parameter(dense.clamp(-limit, limit).to(old.dtype), requires_grad=old.requires_grad))
