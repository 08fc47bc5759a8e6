"""The weighted sum of adapters as a new adapter: cores on the block diagonal, or rounded to smaller ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flora import tucker
from flora.tuner.checks import check_rank
from flora.tuner.config import FloraConfig
from flora.tuner.layer import FloraLayer
from flora.tuner.peft_compat import ModulesToSaveWrapper


class Sum(NamedTuple):
    """The weighted sum of one layer's updates, under the first adapter's scale."""

    scale: Tensor
    core: Tensor
    factors: list[Tensor]


def check_combination(
    model: nn.Module,
    configs: dict[str, FloraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """Raise ValueError, naming the argument and what is accepted, for arguments of ``add_weighted_adapter`` that do not
    fit this model."""
    if combination_type not in ("linear", "cat", "svd"):
        raise ValueError(f"combination_type must be one of linear, cat, svd, got {combination_type!r}")
    if svd_rank is not None and combination_type != "svd":
        raise ValueError(f"svd_rank={svd_rank!r} is for combination_type='svd', got {combination_type!r}")
    check_rank("svd_rank", svd_rank, none=True, many=False)
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: one weight per adapter is needed")
    if missing := sorted(set(adapters) - set(configs)):
        raise ValueError(f"adapters {missing} do not exist; there are {sorted(configs)}")
    if adapter_name in configs:
        raise ValueError(f"adapter {adapter_name!r} exists already; choose another name")
    saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    if twice := [module for module in saved if len(set(adapters) & set(module.modules_to_save)) > 1]:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(twice)} such instance(s)."
        )


def summed(
    layers: Iterable[FloraLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
) -> dict[str, Sum]:
    """The weighted sum for every layer that has one of the adapters, by the layer's name."""
    sums = {}
    for layer in layers:
        present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.tucker_space]
        if present:
            total = _weighted_sum(layer, present)
            if combination_type == "svd":
                ranks = _rounded_ranks(layer, present[0][0], svd_rank)
                total = Sum(total.scale, *tucker.round_ranks(total.core, total.factors, ranks))
            sums[layer.name] = total
    return sums


def _weighted_sum(layer: FloraLayer, present: Sequence[tuple[str, float]]) -> Sum:
    spaces = [layer.space(name) for name, _ in present]
    scale = spaces[0].scale.clone()
    weights = [
        weight * layer.tucker_scaling[name] * (space.scale / scale).item()
        for (name, weight), space in zip(present, spaces, strict=True)
    ]
    wide = torch.promote_types(spaces[0].core.dtype, torch.float32)
    core, factors = tucker.block_sum([(s.core.to(wide), [f.to(wide) for f in s.factors]) for s in spaces], weights)
    return Sum(scale, core, factors)


def _rounded_ranks(layer: FloraLayer, adapter: str, svd_rank: int | None) -> list[int]:
    """The adapter's ranks, with ``svd_rank`` in their place for every mode but the kernel's."""
    ranks = layer.space(adapter).ranks
    return [
        rank if svd_rank is None or role == "kernel" else svd_rank
        for rank, role in zip(ranks, layer.roles, strict=True)
    ]


def combined_config(configs: Sequence[FloraConfig], sums: dict[str, Sum]) -> FloraConfig:
    """The first adapter's config, for the layers of all of them, at the ranks of the sums."""
    rows = [weight for config in configs for weight in config.plan.rows]
    saved = [module for config in configs for module in config.modules_to_save or ()]
    return replace(
        configs[0],
        r=1,
        budget=None,
        rank_pattern={},
        scale_pattern={},
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        target_modules={weight.target for weight in rows if not weight.raw},
        target_parameters={weight.target for weight in rows if weight.raw} or None,
        modules_to_save=list(dict.fromkeys(saved)) or None,
        stack=None,
        ranks={name: list(total.core.shape) for name, total in sums.items()},
        scales={name: total.scale.item() for name, total in sums.items()},
    )


@torch.no_grad()
def fill(model: nn.Module, adapter_name: str, adapters: Sequence[str], sums: dict[str, Sum]) -> None:
    """Copy the sums into the new adapter, and whole modules from the adapter that trained them."""
    for module in model.modules():
        if isinstance(module, FloraLayer) and adapter_name in module.tucker_space:
            scale, core, factors = sums[module.name]
            space = module.space(adapter_name)
            space.assign(core, factors)
            space.set_scale(scale.item())
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for source in set(adapters) & set(module.modules_to_save):  # one at most
                module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
