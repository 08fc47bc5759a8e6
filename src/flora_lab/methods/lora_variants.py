"""LoRA of PEFT with a start from data (EVA, LoRA-GA, CorDA), or with an optimizer of its own (LoRA+)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import TrainerCallback, TrainingArguments

from flora.tuner.data_start.guard import undisturbed
from flora_lab.methods.common import AdaptedModel, CannotAdapt, Request, refuse_quantized
from flora_lab.methods.with_peft import LINEAR, at_rank, lora, lora_fields, narrowest

ADAPTER = "default"


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


def _watch_inputs(model: peft.PeftModel, hooks: Mapping[str, Callable], batches: Iterable[dict]) -> None:
    """Run the model on the batches, with a hook on each layer's inputs."""
    handles = [layer.register_forward_pre_hook(hooks[name]) for name, layer in _layers(model).items()]
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    model.train(training)
    for handle in handles:
        handle.remove()


def _start_from_inputs(model: peft.PeftModel, batches: Iterable[dict]) -> None:
    layers = _layers(model)
    moments = {name: Moments() for name in layers}
    _watch_inputs(model, moments, batches)
    starts = {}
    for name, layer in layers.items():
        if moments[name].count:
            starts[name] = layer.lora_A[ADAPTER].weight.detach().clone()  # (r, in); rows beyond the width stay
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


def lora_ga(request: Request, **options: Any) -> AdaptedModel:
    """LoRA-GA: A and B start with singular vectors of the gradient, which the base weight loses (Wang et al. 2024)."""
    refuse_quantized(request.model)
    adapted = lora(request, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **options)
    for name, layer in _layers(adapted.model).items():
        if 2 * layer.r[ADAPTER] > min(layer.weight.shape):
            raise CannotAdapt(f"LoRA-GA needs twice its rank of {layer.r[ADAPTER]} in each width of {name}")
    unshift = Unshift(adapted.model)
    notes = [*adapted.notes, "saved with the start's part subtracted, at twice the rank"]
    return replace(adapted, notes=notes, callbacks=[unshift], start=partial(_start_from_gradients, unshift))


def _start_from_gradients(unshift: Unshift, batches: Iterable[dict]) -> None:
    """In training mode, as PEFT's own preparation. Equal batches give equal starts, in spite of dropout and PEFT's
    random SVD: a resumed training must start as it did."""
    model, layers = unshift.model, unshift.layers
    with undisturbed(model):
        torch.manual_seed(0)
        gradients = _mean_gradients(model, [layer.get_base_layer().weight for layer in layers], list(batches))
        for layer, gradient in zip(layers, gradients, strict=True):
            layer.get_base_layer()._peft_loraga_grad = gradient  # where PEFT looks for it
            with torch.no_grad():
                layer.lora_ga_init(ADAPTER, model.peft_config[ADAPTER].lora_ga_config)
    unshift.keep_starts()


def _mean_gradients(model: nn.Module, weights: list[nn.Parameter], batches: list[dict]) -> list[Tensor]:
    """Of the loss with respect to frozen weights."""
    sums = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch)["loss"], weights, allow_unused=True, materialize_grads=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return [total / len(batches) for total in sums]


def corda(request: Request, corda_method: str = "ipm", **options: Any) -> AdaptedModel:
    """CorDA: A and B start with parts of the weight, which loses them, along the covariance of its inputs (Yang et al.
    2024): the leading ones ("ipm", which learns most) or the last ones ("kpm", which forgets least)."""
    if corda_method not in ("ipm", "kpm"):
        raise ValueError(f"corda_method={corda_method!r}: expected 'ipm' or 'kpm'")
    refuse_quantized(request.model)
    # PEFT's own start reads the data before there is an adapter, so this one begins as a plain LoRA
    adapted = at_rank(request, peft.LoraConfig, LINEAR, lora_fields, options, most=narrowest)
    for name, layer in _layers(adapted.model).items():
        if layer.r[ADAPTER] > (width := min(layer.weight.shape)):
            raise CannotAdapt(f"CorDA needs a rank of at most the width {width} of {name}, got {layer.r[ADAPTER]}")
    unshift = Unshift(adapted.model)
    notes = [*adapted.notes, "saved with the start's part subtracted, at twice the rank"]
    start = partial(_start_from_covariances, unshift, corda_method)
    return replace(adapted, notes=notes, callbacks=[unshift], start=start)


def _start_from_covariances(unshift: Unshift, method: str, batches: Iterable[dict]) -> None:
    layers = _layers(unshift.model)
    covariances = {name: Covariance() for name in layers}
    _watch_inputs(unshift.model, covariances, batches)
    for name, layer in layers.items():
        if covariances[name].count:
            base, rank = layer.get_base_layer(), layer.r[ADAPTER]
            base.covariance_matrix = covariances[name].sum / covariances[name].count  # where PEFT looks for it
            parts = collect_eigens_for_layer(base, None)
            del base.covariance_matrix
            kept = slice(None, rank) if method == "ipm" else slice(-rank, None)
            u, v = (vectors[:, kept].to(base.weight.device) for vectors in (parts.U_WC, parts.V_WC))
            base.eigens = CordaEigens(S_WC=parts.S_WC[kept].clone(), U_WC=u, V_WC=v)
            layer.corda_init(ADAPTER, "corda")
    unshift.keep_starts()


class Covariance:
    """A hook that sums the covariance of a layer's inputs as PEFT does, over any number of examples and axes: each
    example counts alike, and is divided by its largest entry."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().float()
        rows = rows.reshape(len(rows), -1, rows.shape[-1])
        rows = rows / rows.amax((1, 2), keepdim=True).abs().clamp_min(torch.finfo(rows.dtype).tiny)
        self.count += len(rows)
        self.sum = self.sum + (rows.mT @ rows).sum(0)


class Unshift(TrainerCallback):
    """Gives the base model its weights back after training.

    The adapter gets the start's part of the weight, negative, as ranks r + 1 to 2 r. PEFT's own conversion does the
    same when it saves; without it, an adapter that started from data could not be loaded onto its base model.
    """

    def __init__(self, model: peft.PeftModel) -> None:
        self.model = model
        self.layers = list(_layers(model).values())
        self.starts: list[tuple[Tensor, Tensor]] = []

    def keep_starts(self) -> None:
        """To be called once the adapter has started."""
        self.starts = [
            (layer.lora_A[ADAPTER].weight.detach().clone(), layer.lora_B[ADAPTER].weight.detach().clone())
            for layer in self.layers
        ]

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        config = self.model.peft_config[ADAPTER]
        more = 2 ** (0.5 if config.use_rslora else 1)  # keeps the scale
        config.init_lora_weights, config.lora_ga_config = True, None
        for layer, start in zip(self.layers, self.starts, strict=True):
            factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            trained = [factor.clone() for factor in factors]
            for factor, first in zip(factors, start, strict=True):
                factor.copy_(first)
            layer.get_base_layer().weight += layer.get_delta_weight(ADAPTER)
            rank, alpha = 2 * layer.r[ADAPTER], more * layer.lora_alpha[ADAPTER]
            layer.update_layer(ADAPTER, rank, lora_alpha=alpha, config=config)
            layer.lora_A[ADAPTER].weight.copy_(torch.cat([trained[0], start[0]]))
            layer.lora_B[ADAPTER].weight.copy_(torch.cat([trained[1], -start[1]], dim=1))
        config.r, config.lora_alpha = 2 * config.r, more * config.lora_alpha
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}


def _layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
