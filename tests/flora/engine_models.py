"""The models that engines of distributed training are tried with, and their adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from flora import FloraConfig

if TYPE_CHECKING:
    from engines import Alone

TOKENS = torch.arange(12).view(2, 6)


class Block(nn.Module):
    """A linear layer and a grouped convolution, whose update acts as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.linear(x).mT).mT.tanh()


class Experts(nn.Module):
    """Matrices in one stacked parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.stack[0]).tanh() @ self.stack[1]


class Tiny(nn.Module):
    _no_split_modules = ["Block"]  # noqa: RUF012  for PEFT's own wrap policy

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.experts = nn.Embedding(12, 8), nn.ModuleList([Block(), Block()]), Experts()
        self.head, self.checkpointing = nn.Linear(8, 12), False

    def activation_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.experts(x))


def adapted(engine: type[Alone], folder: Path, seed: int = 1, method: str = "flora", **options: Any) -> PeftModel:
    """The engine's model with an adapter; the same numbers wherever the seed is the same."""
    torch.manual_seed(0)
    base = engine.base(folder).to(engine.dtype)
    torch.manual_seed(seed)
    targets: dict[str, Any] = {"target_modules": engine.targets, "target_parameters": engine.parameters}
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=2, **targets, init_lora_weights=False), autocast_adapter_dtype=False)
    return get_peft_model(base, FloraConfig(r=2, **targets, **{"init_weights": False, **options}))


def llama(folder: Path, **options: Any) -> LlamaForCausalLM:
    """A language model, from files as tensor parallelism needs it. transformers writes weights in the first process
    only, so no other may make the folder."""
    if not (dist.is_initialized() and dist.get_rank()) and not (folder / "llama").exists():
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes, num_key_value_heads=2, max_position_embeddings=16))
        made.save_pretrained(folder / "llama")
    barrier()
    return LlamaForCausalLM.from_pretrained(folder / "llama", **options)


def batch(number: int) -> Tensor:
    """The rows of all processes."""
    return torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(number))


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(model(tokens)).flatten(0, 1).float(), tokens.flatten())


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
