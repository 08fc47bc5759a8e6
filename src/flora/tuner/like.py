"""The FLoRA config that stands for another PEFT method's: the same targets, and as many trainable parameters."""

from __future__ import annotations

import copy
import re
from dataclasses import fields, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from flora.ranks import Weight, solve_budget
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import BaseTunerLayer
from flora.tuner.planning.plan import plan

OWN = ("peft_type", "peft_version", "auto_mapping", "init_weights", "inference_mode", "r", "rank_pattern", "ranks")


def config_like(other: PeftConfig, model: nn.Module | None, changes: dict[str, Any]) -> FloraConfig:
    """See ``FloraConfig.like``."""
    name = str(getattr(other.peft_type, "value", other.peft_type))
    known = {field.name for field in fields(other)}
    if "target_modules" not in known:
        raise ValueError(f"{type(other).__name__} ({name}) adapts no layers, so that FLoRA has no counterpart of it")
    if getattr(other, "layer_replication", None):
        raise ValueError("layer_replication makes another model, which FLoRA does not: replicate its layers first")
    common = {field.name for field in fields(FloraConfig)} & known - {*OWN}
    keys = {key: copy.copy(getattr(other, key)) for key in sorted(common)}
    if str(keys.get("bias", "none")).endswith("_only"):
        keys["bias"] = "flora_only"
    if "lora_dropout" in known:
        keys["dropout"] = other.lora_dropout
    if not {"r", "budget"} & changes.keys():
        keys |= _size(other, known) if model is None else _size_on(other, model, keys | changes)
    return FloraConfig(**keys | changes)


def _size(other: Any, known: set[str]) -> dict[str, Any]:
    """The same ranks, where no model tells the number of parameters."""
    if not isinstance(getattr(other, "r", None), int) or not other.r:
        raise ValueError(f"{type(other).__name__} has no rank: give the model, or r= or budget=")
    rank = getattr(other, "target_r", other.r)  # AdaLoRA's, which it ends with
    return {"r": rank, "rank_pattern": dict(other.rank_pattern or {}) if "rank_pattern" in known else {}}


def _size_on(other: PeftConfig, model: nn.Module, keys: dict[str, Any]) -> dict[str, Any]:
    """The budget of the other method's adapter. A layer at a rank of its own there has its own share here, too."""
    adapted = _adapted(other, model)
    counts = _counts(adapted)
    if keys["target_modules"] is None and not keys.get("target_parameters"):
        keys["target_modules"] = adapted.peft_config["default"].target_modules  # PEFT's choice for the model
    size: dict[str, Any] = {"budget": sum(counts.values()), "target_modules": keys["target_modules"]}
    if getattr(other, "rank_pattern", None):
        ranks = {module: next(iter(layer.r.values())) for module, layer in _layers(adapted)}
        special = {module for module, rank in ranks.items() if rank != other.r}
        rows = plan(model, FloraConfig(**keys | {"r": 1, "scale_pattern": None})).rows
        single = [row for row in rows if sum(row.module == each.module for each in rows) == 1]
        weights = {row.module: Weight(row.shape, row.site.kind.roles_of(row.shape)) for row in single}
        size["rank_pattern"] = {
            re.escape(module): list(solve_budget([weights[module]], count, None)[0])
            for module, count in counts.items()
            if module in special and module in weights
        }
    return size


def _adapted(other: PeftConfig, model: nn.Module) -> PeftModel:
    """A copy of the model with the other method's adapter. It has no numbers, and the model stays as it is."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has adapters already; give the base model")
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    plain = {"init_lora_weights": True, "init_r": getattr(other, "target_r", None)}  # no start reads numbers
    other = replace(other, **{key: value for key, value in plain.items() if hasattr(other, key)})
    with torch.device("meta"):
        return get_peft_model(copy.deepcopy(model, memo), other)


def _layers(adapted: PeftModel) -> list[tuple[str, Any]]:
    """The other method's layers by their names in the base model."""
    return [
        (re.sub(r"(\.base_layer)+$", "", name.removeprefix("base_model.model.")), module)
        for name, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _counts(adapted: PeftModel) -> dict[str, int]:
    """The adapter's trainable parameters per layer, without what is trained whole."""
    prefix, seen = adapted.base_model.prefix, set[int]()
    counts: dict[str, int] = {}
    for module, layer in _layers(adapted):
        own = [
            parameter
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad and name.startswith(prefix) and id(parameter) not in seen
        ]
        seen |= set(map(id, own))
        counts[module] = counts.get(module, 0) + sum(parameter.numel() for parameter in own)
    return {module: count for module, count in counts.items() if count}
