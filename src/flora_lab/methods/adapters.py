"""Bottleneck adapters in transformer blocks: Houlsby et al. 2019 and Pfeiffer et al. 2020, as the paper compares with
them (section 5.2, from He et al. 2021 and Zhang et al. 2022).

    x  <-  x + W_up f(W_down x + b_down) + b_up        W_down: (width, size);  W_up: (size, width), zero at the start

Houlsby's has two in a block: on what the attention and the feed-forward network put out, before the residual sum and
the LayerNorm. Pfeiffer's has one, behind the feed-forward network: behind its residual sum and LayerNorm where a
LayerNorm follows (BERT), before the residual sum where none does (ViT). LayerNorms stay frozen, as the paper's
counts say.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from flora_lab.methods.common import AdaptedModel, CannotAdapt, Request, fitting, said

# In a block: the layer that ends the attention, the one that ends the feed-forward network, the LayerNorm behind it
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
FIRST_STD = 0.01  # Houlsby et al., section 2.1: Gaussian, cut at two standard deviations


def houlsby(request: Request, width: int | None = None, activation: str = "gelu") -> AdaptedModel:
    return _with_adapters(request, HOULSBY, width, activation)


def pfeiffer(request: Request, width: int | None = None, activation: str = "relu") -> AdaptedModel:
    return _with_adapters(request, PFEIFFER, width, activation)


def _with_adapters(request: Request, kind: str, width: int | None, activation: str) -> AdaptedModel:
    """Bottleneck adapters, as wide as the budget says."""
    names = places(request.model, kind)
    if not names:
        raise CannotAdapt("there are no transformer blocks of a known kind to put adapters in")
    sizes = [size_at(request.model, name) for name in names]
    if width is None:

        def count(width: int) -> int:
            return sum((2 * size + 1) * width + size for size in sizes)

        width = fitting(count, request.budget, "an adapter of width", max(sizes))
    request.train_head_only()
    insert(request.model, names, width, activation)
    return AdaptedModel(request.model, [f"width {said(width, max(sizes))} in {len(names)} places"])


class Bottleneck(nn.Module):
    def __init__(self, like: Tensor, size: int, width: int, activation: str) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.down = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(self.down.weight, std=FIRST_STD, a=-2 * FIRST_STD, b=2 * FIRST_STD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, size) -> (…, size)."""
        return x + self.up(self.activation(self.down(x)))


def places(model: nn.Module, kind: str) -> list[str]:
    """Names of the modules whose output an adapter takes; none where there are no transformer blocks."""
    names = []
    for block, (attention, feed_forward, norm) in _blocks(model):
        own = [attention, feed_forward] if kind == HOULSBY else [norm or feed_forward]
        names += [f"{block}.{name}" if block else name for name in own]
    return names


def size_at(model: nn.Module, place: str) -> int:
    """Width of what the module puts out."""
    return len(model.get_submodule(place).weight)


def insert(model: nn.Module, names: list[str], width: int, activation: str) -> None:
    """Put an adapter on the output of every named module, as its submodule ``adapter``.

    Raises ValueError for an activation that transformers does not know.
    """
    from transformers.activations import ACT2FN

    if activation not in ACT2FN:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(sorted(ACT2FN))}")
    for name in names:
        module = model.get_submodule(name)
        module.add_module("adapter", Bottleneck(module.weight, size_at(model, name), width, activation))
        module.register_forward_hook(_adapted)


def _adapted(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return module.adapter(output)


def _blocks(model: nn.Module) -> Iterator[tuple[str, tuple[str, str, str | None]]]:
    """(name, where its parts are) of every transformer block."""
    for name, module in model.named_modules():
        for attention, feed_forward, norm in BLOCKS:
            if _weight_at(module, attention) and _weight_at(module, feed_forward):
                yield name, (attention, feed_forward, norm if norm and _weight_at(module, norm) else None)
                break


def _weight_at(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = getattr(module, part, None)
    return isinstance(getattr(module, "weight", None), nn.Parameter)
