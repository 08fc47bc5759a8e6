"""LoRA of PEFT with a start from data (EVA), or with an optimizer of its own (LoRA+)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import TrainingArguments

from flora_lab.methods.common import AdaptedModel, Request
from flora_lab.methods.with_peft import lora


def loraplus(request: Request, loraplus_lr_ratio: float = 16.0, **options: Any) -> AdaptedModel:
    """LoRA+ trains B, and biases, at ``loraplus_lr_ratio`` times the learning rate (Hayou et al. 2024)."""
    if not loraplus_lr_ratio >= 1:
        raise ValueError(f"loraplus_lr_ratio={loraplus_lr_ratio}: expected a number from 1")
    adapted = lora(request, **options)
    return replace(adapted, optimizer=partial(_loraplus_optimizer, adapted.model, loraplus_lr_ratio))


def _loraplus_optimizer(model: nn.Module, ratio: float, args: TrainingArguments) -> Optimizer:
    return create_loraplus_optimizer(
        model,
        AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_lr_embedding=args.learning_rate,  # as LoRA's: PEFT's 1e-6 would waste the embeddings' parameters
        loraplus_weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def eva(request: Request, **options: Any) -> AdaptedModel:
    """EVA: A starts with the principal components of the layer's inputs (Paischer et al. 2024), at equal ranks."""
    config = peft.EvaConfig(rho=1.0)  # no redistribution of ranks: it would change the number of parameters
    adapted = lora(request, init_lora_weights="eva", eva_config=config, **options)
    return replace(adapted, start=partial(_start_from_inputs, adapted.model))


def _start_from_inputs(model: peft.PeftModel, batches: Iterable[dict]) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    moments = {name: Moments() for name in layers}
    handles = [layer.register_forward_pre_hook(moments[name]) for name, layer in layers.items()]
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    starts = {}
    for name, layer in layers.items():
        if moments[name].count:
            starts[name] = layer.lora_A["default"].weight.detach().clone()  # (r, in); rows beyond the width stay
            components = moments[name].components(len(starts[name]))
            starts[name][: len(components)] = components
    peft.initialize_lora_eva_weights(model, eva_state_dict=starts)


class Moments:
    """A hook that sums what the principal components of a layer's inputs need.

    It replaces PEFT's incremental SVD, which repeats the batches without end where a layer gets fewer inputs than its
    rank, and fails on inputs that are not contiguous. The components are the exact ones of the batches.
    """

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.squares = self.squares + rows.mT @ rows

    def components(self, rank: int) -> Tensor:
        """The leading components, (at most rank, in)."""
        mean = self.sum / self.count
        _, vectors = torch.linalg.eigh(self.squares / self.count - torch.outer(mean, mean))  # ascending
        return vectors.mT.flip(0)[:rank]
