"""The workloads: one row of `WORKLOADS` each, a frozen model with random weights, one batch and the targets.

The batch and the output of embeddings require a gradient. So every layer computes the gradient of its input, as in the
middle of a network, with every method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

GROUPS = {
    "a": "3×3 convolutions",
    "b": "a block with a depthwise convolution",
    "c": "transformer blocks",
    "d": "stacked experts",
    "e": "whole models",
}
TINY_RANK = 2


@dataclass
class Case:
    """A model and one batch, the keyword arguments of its forward.

    ``output`` picks the tensor at which backward starts: a scalar loss, or an output that gets a fixed random gradient.
    """

    model: nn.Module
    batch: dict[str, Any]
    output: Callable[[Any], Tensor] = field(default=lambda result: result)
    gradient: Tensor | None = None

    def forward(self, model: Callable[..., Any]) -> Tensor:
        return self.output(model(**self.batch))

    def backward(self, output: Tensor) -> None:
        if self.gradient is None:
            self.gradient = torch.randn_like(output) if output.ndim else torch.ones_like(output)
        output.backward(self.gradient.to(output.dtype))
        for tensor in self.batch.values():
            if isinstance(tensor, Tensor):
                tensor.grad = None


@dataclass(frozen=True)
class Workload:
    """A row of the table.

    Attributes:
        group: a key of GROUPS.
        rank: LoRA's rank; its parameters are every variant's budget.
        targets: what to adapt, as fields of a PEFT config.
        build: makes the case; ``tiny`` a small one for tests.
    """

    group: str
    rank: int
    targets: Mapping[str, Any]
    build: Callable[[], Case]
    tiny: Callable[[], Case]

    def case(self, tiny: bool, seed: int, device: str) -> Case:
        torch.manual_seed(seed)
        case = self.tiny() if tiny else self.build()
        case.model.requires_grad_(False).train().to(device)
        case.batch = tree_map_only(Tensor, lambda t: t.to(device), case.batch)
        for tensor in case.batch.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
        return case

    def lora_rank(self, tiny: bool) -> int:
        return TINY_RANK if tiny else self.rank


def convolutions(width: int, batch: int, side: int) -> Case:
    model = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(4)))
    return Case(model, {"input": torch.randn(batch, width, side, side)})


def convnext_block(width: int, batch: int, side: int) -> Case:
    from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Config, ConvNextV2Layer

    return Case(ConvNextV2Layer(ConvNextV2Config(), width), {"features": torch.randn(batch, width, side, side)})


def bert_block(width: int, heads: int, batch: int, length: int) -> Case:
    from transformers.models.bert.modeling_bert import BertLayer

    return Case(BertLayer(_bert_config(width, heads)), {"hidden_states": torch.randn(batch, length, width)})


def llama_block(width: int, between: int, heads: int, batch: int, length: int) -> Case:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=width, intermediate_size=between, num_attention_heads=heads, attn_implementation="sdpa"
    )
    hidden = torch.randn(batch, length, width)
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(length)[None])
    return Case(LlamaDecoderLayer(config, layer_idx=0), {"hidden_states": hidden, "position_embeddings": positions})


def experts(width: int, between: int, count: int, length: int) -> Case:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=width, intermediate_size=between, num_local_experts=count, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    model = MixtralSparseMoeBlock(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return Case(model, {"hidden_states": torch.randn(1, length, width)})


def convnext(width: int, depth: int, batch: int, side: int) -> Case:
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width], depths=[depth, depth, 3 * depth, depth], num_labels=10
    )
    inputs = {"pixel_values": torch.randn(batch, 3, side, side), "labels": torch.arange(batch) % 10}
    return Case(ConvNextV2ForImageClassification(config), inputs, _loss)


def unet(width: int, text: int, batch: int, side: int) -> Case:
    """The U-Net of Stable Diffusion 1.5, cut to two resolutions with one layer each."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text,
        norm_num_groups=min(32, width),
    )
    inputs = {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.arange(batch),
        "encoder_hidden_states": torch.randn(batch, 77, text),
    }
    return Case(model, inputs, lambda result: result.sample)


def bert(width: int, heads: int, layers: int, batch: int, length: int) -> Case:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(_bert_config(width, heads, num_hidden_layers=layers))
    model.bert.embeddings.register_forward_hook(_require_gradient)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length))
    return Case(model, {"input_ids": tokens, "labels": torch.arange(batch) % 2}, _loss)


def _bert_config(width: int, heads: int, **options: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
        **options,
    )


def _require_gradient(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _loss(result: Any) -> Tensor:
    return result.loss


_CONVOLUTIONS = {"target_modules": r"\d"}
_CONVNEXT = {"target_modules": r".*(pwconv1|pwconv2|patch_embeddings|downsampling_layer\.1)"}
_BERT = {"target_modules": ["query", "key", "value", "dense"]}
_LLAMA = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
_UNET = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]}

WORKLOADS: dict[str, Workload] = {
    "conv-64": Workload(
        "a", 8, _CONVOLUTIONS,
        partial(convolutions, width=64, batch=16, side=32),
        partial(convolutions, width=8, batch=2, side=8),
    ),
    "conv-192": Workload(
        "a", 8, _CONVOLUTIONS,
        partial(convolutions, width=192, batch=16, side=16),
        partial(convolutions, width=12, batch=2, side=4),
    ),
    "conv-320": Workload(
        "a", 8, _CONVOLUTIONS,
        partial(convolutions, width=320, batch=2, side=32),
        partial(convolutions, width=16, batch=1, side=8),
    ),
    "depthwise": Workload(
        "b", 16, _CONVNEXT,
        partial(convnext_block, width=192, batch=8, side=28),
        partial(convnext_block, width=8, batch=2, side=8),
    ),
    "block-768": Workload(
        "c", 16, _BERT,
        partial(bert_block, width=768, heads=12, batch=8, length=256),
        partial(bert_block, width=32, heads=4, batch=2, length=8),
    ),
    "block-4096": Workload(
        "c", 16, _LLAMA,
        partial(llama_block, width=4096, between=11008, heads=32, batch=1, length=512),
        partial(llama_block, width=32, between=64, heads=4, batch=1, length=8),
    ),
    "experts": Workload(
        "d", 16, _EXPERTS,
        partial(experts, width=512, between=1024, count=8, length=512),
        partial(experts, width=16, between=32, count=4, length=16),
    ),
    "convnextv2-tiny": Workload(
        "e", 16, _CONVNEXT,
        partial(convnext, width=96, depth=3, batch=8, side=224),
        partial(convnext, width=8, depth=1, batch=2, side=32),
    ),
    "unet": Workload(
        "e", 8, _UNET,
        partial(unet, width=320, text=768, batch=2, side=32),
        partial(unet, width=16, text=32, batch=1, side=8),
    ),
    "bert-base": Workload(
        "e", 16, _BERT,
        partial(bert, width=768, heads=12, layers=12, batch=8, length=128),
        partial(bert, width=32, heads=4, layers=2, batch=2, length=8),
    ),
}  # fmt: skip
