"""The ways to fine-tune a model that a run compares: one function each, a row in `METHODS`.

Each takes a model, the names of its head (always trained, and counted alike), the budget of an adapter's trainable
parameters, and options for the method's own PEFT config. It returns the model to train and notes for the reader.
"""

from collections.abc import Callable, Sequence

import peft
from torch import nn

from flora import FloraConfig


def adapt(name: str, model: nn.Module, head: Sequence[str], budget: int, options: dict) -> tuple[nn.Module, list[str]]:
    return METHODS[name](model, list(head), budget, **options)


def full(model: nn.Module, head: list[str], budget: int) -> tuple[nn.Module, list[str]]:
    """Every weight is trained: what the adapters are measured against, no budget."""
    return model, []


def head_only(model: nn.Module, head: list[str], budget: int) -> tuple[nn.Module, list[str]]:
    """A linear probe: how far the frozen features go by themselves."""
    model.requires_grad_(False)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    return model, []


def lora(model: nn.Module, head: list[str], budget: int, **options) -> tuple[nn.Module, list[str]]:
    """PEFT's LoRA on every layer that it can adapt and merge, at the highest rank within the budget."""
    per_rank, grouped = {}, []
    for name, layer in model.named_modules():
        if name in head or not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if getattr(layer, "groups", 1) == 1:
            per_rank[name] = len(layer.weight) + layer.weight[0].numel()
        else:
            grouped.append(name)
    least = sum(per_rank.values())
    if "r" not in options and budget < least:
        raise ValueError(f"budget={budget}: LoRA of rank 1 has {least} parameters")
    rank = options.pop("r", budget // least)
    settings = {"lora_alpha": 2 * rank, "target_modules": list(per_rank), "modules_to_save": head, **options}
    notes = [f"rank {rank} on {len(per_rank)} layers"]
    if grouped:
        notes.append(f"left out, since it cannot merge grouped convolutions: {', '.join(grouped)}")
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, **settings)), notes


def flora(model: nn.Module, head: list[str], budget: int, **options) -> tuple[nn.Module, list[str]]:
    settings = {"target_modules": "all-weights", "modules_to_save": head, **options}
    if "r" not in options:
        settings["budget"] = budget
    return peft.get_peft_model(model, FloraConfig(**settings)), []


METHODS: dict[str, Callable[..., tuple[nn.Module, list[str]]]] = {
    "full": full,
    "head": head_only,
    "lora": lora,
    "flora": flora,
}
