"""Bottleneck adapters of Houlsby et al. 2019 and Pfeiffer et al. 2020, two baselines of the paper (section 5.2).

    x  <-  x + W_up f(W_down x + b_down) + b_up        W_down: (width, size);  W_up: (size, width), zero at the start

Houlsby's method has two adapters per transformer block: one on the output of the attention, one on the output of the
feed-forward network, each before the residual sum and the LayerNorm. Pfeiffer's has one per block, after the
feed-forward network: behind the LayerNorm where one follows (BERT), before the residual sum otherwise (ViT). LayerNorms
stay frozen, which agrees with the paper's parameter counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flora_lab.methods.budget import nearest_size, size_note
from flora_lab.methods.common import AdaptedModel, CannotAdapt, Request, weight_shape

# Within a block: the last layer of the attention, the last one of the feed-forward network, the LayerNorm behind that
BLOCKS = (
    ("attention.output.dense", "output.dense", "output.LayerNorm"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    ("attention.attn.o", "output.dense", "output.LayerNorm"),  # MPNet
    ("attention.out_lin", "ffn.lin2", "output_layer_norm"),  # DistilBERT
    ("attention.o_proj", "mlp.fc2", None),  # ViT, DeiT, BEiT, DINOv2
    ("attn.proj", "mlp.fc2", None),  # timm's
    ("self_attn.out_proj", "mlp.fc2", None),  # CLIP, SigLIP
    ("attn.Wo", "mlp.Wo", None),  # ModernBERT
    ("self_attn.o_proj", "mlp.down_proj", None),  # Llama, Qwen
)
HOULSBY, PFEIFFER = "houlsby", "pfeiffer"
START_STD = 0.01  # Houlsby et al., section 2.1: Gaussian, cut at two standard deviations


def houlsby(request: Request, width: int | None = None, activation: str = "gelu") -> AdaptedModel:
    return _with_adapters(request, HOULSBY, width, activation)


def pfeiffer(request: Request, width: int | None = None, activation: str = "relu") -> AdaptedModel:
    return _with_adapters(request, PFEIFFER, width, activation)


def _with_adapters(request: Request, method: str, width: int | None, activation: str) -> AdaptedModel:
    names = places(request.model, method)
    if not names:
        raise CannotAdapt("the model has no transformer blocks of a known layout")
    sizes = [size_at(request.model, name) for name in names]
    full = max(sizes)

    def count(width: int) -> int:
        return sum((2 * size + 1) * width + size for size in sizes)

    width = width or nearest_size(count, request.budget, full, "width")
    request.train_head_only()
    insert(request.model, names, width, activation)
    return AdaptedModel(request.model, [f"width {size_note(width, full)} in {len(names)} places"])


class Bottleneck(nn.Module):
    """An adapter on features of ``size``, on the device of ``like``, in float64 if that is and else in float32."""

    def __init__(self, like: Tensor, size: int, width: int, activation: str) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        place = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.down = nn.Linear(size, width, **place)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(width, size, **place)
        nn.init.trunc_normal_(self.down.weight, std=START_STD, a=-2 * START_STD, b=2 * START_STD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, size) -> (…, size), of x's type."""
        return x + self.up(self.activation(self.down(x.to(self.down.weight.dtype)))).to(x.dtype)


def places(model: nn.Module, method: str) -> list[str]:
    """Names of the modules whose output gets an adapter; empty where the model has no transformer blocks."""
    names = []
    for block, (attention, feed_forward, norm) in _blocks(model):
        own = [attention, feed_forward] if method == HOULSBY else [norm or feed_forward]
        names += [f"{block}.{name}" if block else name for name in own]
    return names


def size_at(model: nn.Module, place: str) -> int:
    """Number of features of the module's output."""
    return weight_shape(model.get_submodule(place))[0]


def insert(model: nn.Module, names: list[str], width: int, activation: str) -> None:
    """Put an adapter on the output of each named module, as its submodule ``adapter``.

    Raises ValueError for an activation that transformers does not have.
    """
    from transformers.activations import ACT2FN

    if activation not in ACT2FN:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(sorted(ACT2FN))}")
    for name in names:
        module = model.get_submodule(name)
        module.add_module("adapter", Bottleneck(module.weight, size_at(model, name), width, activation))
        module.register_forward_hook(_apply_adapter)


def _apply_adapter(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return module.adapter(output)


def _blocks(model: nn.Module) -> Iterator[tuple[str, tuple[str, str, str | None]]]:
    """Every transformer block: its name, and where its parts are (an entry of BLOCKS)."""
    for name, module in model.named_modules():
        for attention, feed_forward, norm in BLOCKS:
            if _weight_at(module, attention) and _weight_at(module, feed_forward):
                yield name, (attention, feed_forward, norm if norm and _weight_at(module, norm) else None)
                break


def _weight_at(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = getattr(module, part, None)
    return isinstance(getattr(module, "weight", None), nn.Parameter)
