"""The ways to fine-tune a model that a comparison compares: one function each, a row in `METHODS`.

Every method adapts the same layers, those of them that it can; the rest is named in its notes. Its rank (the width of
an adapter) is the one whose trainable parameters, the head's aside, are nearest to the budget, counted on the meta
device; FLoRA, whose ranks are fine enough, stays within it. The head is trained by all.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import flora as library
from flora.baselines import adalora as adalora_training
from flora.baselines import adapters
from flora.baselines.common import (
    Adapted,
    Asked,
    LeftOut,
    Limits,
    copied,
    fitting,
    head_parameters,
    highest_rank,
    on_meta,
    shortened,
    too_small,
    trainable,
)
from flora.config import FloraConfig, check_rank

LOKR_FACTORS = (-1, 16, 8, 4, 2)  # -1: as near to a square as can be

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DORA = Limits((nn.Linear, Conv1D, *_CONVOLUTIONS, nn.Embedding), ("groups", "dilation", "padding_mode"))
_LORA = Limits((*_DORA.layers, nn.MultiheadAttention), _DORA.lost)
_ADALORA = Limits((nn.Linear, Conv1D, nn.Conv2d), ("groups", "padding_mode"))
_LOHA = _LOKR = Limits((nn.Linear, nn.Conv1d, nn.Conv2d), ("padding_mode",))
_LOCON = Limits((nn.Linear, *_CONVOLUTIONS), ("padding_mode",))


@dataclass(frozen=True)
class Way:
    """``label``: for tables. ``size``: the option that fixes the adapter's size in place of a budget, None where it has
    none to choose."""

    function: Callable[..., Adapted]
    label: str
    size: str | None = None

    @property
    def sized(self) -> bool:
        return self.size is not None


def adapt(
    way: str,
    model: nn.Module,
    head: Sequence[str],
    budget: int,
    options: dict[str, Any],
    *,
    targets: str | Sequence[str] = "all-weights",
    steps: int = 1000,
) -> Adapted:
    """``model`` (changed in place) set up for training in one of the `METHODS`.

    Args:
        way: a key of `METHODS`.
        head: names of the modules that are trained whole.
        budget: trainable parameters of the adapter, the head's not counted; unused where options fix the size.
        options: fields of the method's own config; its ``size`` (`Way`) fixes the rank or the width.
        targets: what is adapted, as FloraConfig's ``target_modules`` takes it.
        steps: optimizer steps of the whole training (AdaLoRA's schedule).

    Raises:
        LeftOut: the method can't run on this model, or not at this budget.
        ValueError, TypeError: an unknown way, head or option, or a value that is not accepted.
    """
    if way not in METHODS:
        raise ValueError(f"method {way!r}: expected one of {', '.join(METHODS)}")
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules:
            raise ValueError(f"head {name!r}: the model has no such module")
    size = METHODS[way].size
    if size in options:
        check_rank(size, options[size], many=way == "flora")
    elif size:
        check_rank("budget", budget, many=False)
    return METHODS[way].function(Asked(model, list(head), budget, targets, steps), **options)


# ------------------------------------------------------------------------------------------------- without a budget


def full(asked: Asked) -> Adapted:
    """Every weight is trained: what the adapters are measured against."""
    return Adapted(asked.model.requires_grad_(True))


def head_only(asked: Asked) -> Adapted:
    """A linear probe: how far the frozen features go by themselves."""
    if not asked.head:
        raise LeftOut("there is no head to train")
    asked.train_head_only()
    return Adapted(asked.model)


def bitfit(asked: Asked) -> Adapted:
    """Every bias (Zaken et al. 2021)."""
    asked.train_head_only()
    before = trainable(asked.model)
    for name, parameter in asked.model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    if trainable(asked.model) == before:
        raise LeftOut("the model has no bias but the head's")
    return Adapted(asked.model)


# ------------------------------------------------------------------------------------------------- adapters


def houlsby(asked: Asked, width: int | None = None, activation: str = "gelu") -> Adapted:
    return _with_adapters(asked, adapters.HOULSBY, width, activation)


def pfeiffer(asked: Asked, width: int | None = None, activation: str = "relu") -> Adapted:
    return _with_adapters(asked, adapters.PFEIFFER, width, activation)


def _with_adapters(asked: Asked, kind: str, width: int | None, activation: str) -> Adapted:
    """Bottleneck adapters, as wide as the budget says."""
    places = adapters.places(asked.model, kind)
    if not places:
        raise LeftOut("there are no transformer blocks of a known kind to put adapters in")
    sizes = [adapters.size_at(asked.model, place) for place in places]
    if width is None:
        width = fitting(
            lambda width: sum((2 * size + 1) * width + size for size in sizes), asked.budget, "an adapter of width"
        )
    asked.train_head_only()
    adapters.insert(asked.model, places, width, activation)
    return Adapted(asked.model, [f"width {width} in {len(places)} places"])


# ------------------------------------------------------------------------------------------------- PEFT's own


def lora(asked: Asked, target_modules: Any = None, r: int | None = None, **options: Any) -> Adapted:
    return _lora(asked, "LoRA", _LORA, target_modules, r, options)


def dora(asked: Asked, target_modules: Any = None, r: int | None = None, **options: Any) -> Adapted:
    return _lora(asked, "DoRA", _DORA, target_modules, r, {"use_dora": True, **options})


def _lora(asked: Asked, label: str, limits: Limits, target_modules: Any, r: int | None, options: dict) -> Adapted:
    layers, notes = asked.layers(limits, target_modules)
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())

    def config(rank: int) -> peft.LoraConfig:
        fields = {"lora_alpha": 2 * rank, "fan_in_fan_out": transposed, **options}
        return peft.LoraConfig(r=rank, **fields, **_where(asked, layers))

    rank = r or fitting(lambda rank: _count(asked, config(rank)), asked.budget, f"{label} of rank")
    return Adapted(_wrap(asked, asked.model, config(rank)), [f"rank {rank} on {len(layers)} layers", *notes])


def loha(asked: Asked, target_modules: Any = None, r: int | None = None, **options: Any) -> Adapted:
    layers, notes = asked.layers(_LOHA, target_modules)

    def config(rank: int) -> peft.LoHaConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoHaConfig(r=rank, **fields, **_where(asked, layers))

    rank = r or fitting(lambda rank: _count(asked, config(rank)), asked.budget, "LoHa of rank")
    return Adapted(_wrap(asked, asked.model, config(rank)), [f"rank {rank} on {len(layers)} layers", *notes])


def lokr(
    asked: Asked,
    target_modules: Any = None,
    r: int | None = None,
    decompose_factor: int | None = None,
    **options: Any,
) -> Adapted:
    """A Kronecker product holds few parameters, so its factor is chosen too."""
    layers, notes = asked.layers(_LOKR, target_modules)

    def config(factor: int, rank: int) -> peft.LoKrConfig:
        fields = {"alpha": rank, "use_effective_conv2d": True, **options}
        return peft.LoKrConfig(r=rank, decompose_factor=factor, **fields, **_where(asked, layers))

    @cache
    def count(factor: int, rank: int) -> int:
        return _count(asked, config(factor, rank))

    if r:
        factor, rank = decompose_factor or LOKR_FACTORS[0], r
    else:
        factors = [decompose_factor] if decompose_factor else LOKR_FACTORS
        most = max(max(layer.weight.shape[:2]) for layer in layers.values())  # nothing grows beyond
        solved = [(factor, highest_rank(partial(count, factor), asked.budget, most)) for factor in factors]
        solved = [(factor, rank) for factor, rank in solved if rank]
        if not solved:
            too_small("LoKr of rank", min(count(factor, 1) for factor in factors), asked.budget)
        factor, rank = max(solved, key=lambda pair: count(*pair))
    notes = [f"rank {rank}, factor {factor} on {len(layers)} layers", *notes]
    return Adapted(_wrap(asked, asked.model, config(factor, rank)), notes)


def adalora(
    asked: Asked, target_modules: Any = None, target_r: int | None = None, init_r: int | None = None, **options: Any
) -> Adapted:
    """The budget is for the ranks at the end; it starts with half as much again."""
    if "r" in options:
        raise ValueError("r: AdaLoRA has target_r in its place")
    if asked.steps < 2:
        raise LeftOut(f"AdaLoRA needs two steps at least, the training has {asked.steps}")
    layers, notes = asked.layers(_ADALORA, target_modules)
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())

    def config(target: int, first: int) -> peft.AdaLoraConfig:
        fields = {"lora_alpha": 2 * first, "fan_in_fan_out": transposed, **adalora_training.schedule(asked.steps)}
        return peft.AdaLoraConfig(target_r=target, init_r=first, **fields | options, **_where(asked, layers))

    def count(rank: int) -> int:
        return _count(asked, config(rank, rank))

    target = target_r or fitting(count, asked.budget, "AdaLoRA of rank")
    size = count(target)
    first = init_r or -(-3 * target // 2)
    if first <= target:
        raise ValueError(f"init_r={first}: expected more than target_r={target}, which it is cut to")
    model = _wrap(asked, asked.model, config(target, first), adalora_training.RegularisedModel)
    notes = [f"rank {first}, cut to {target} on average, on {len(layers)} layers", *notes]
    return Adapted(model, notes, [adalora_training.Allocation()], parameters=size)


def _where(asked: Asked, layers: Iterable[str]) -> dict[str, Any]:
    """The fields of a PEFT config that name exactly these layers, and the head."""
    return {"target_modules": "|".join(map(re.escape, layers)), "modules_to_save": asked.head or None}


def _count(asked: Asked, config: peft.PeftConfig) -> int:
    """Trainable parameters of the adapter, the head's aside."""
    with torch.device("meta"):
        return trainable(_wrap(asked, copied(asked.model, on_meta), config)) - head_parameters(asked.model, asked.head)


def _wrap(
    asked: Asked, model: nn.Module, config: peft.PeftConfig, kind: type[peft.PeftModel] = peft.PeftModel
) -> peft.PeftModel:
    heads = tuple(asked.head)
    for name, _ in asked.model.named_modules():
        if heads and name.endswith(heads) and name not in heads:
            raise ValueError(
                f"head {', '.join(heads)}: PEFT would train {name!r} too, which ends alike; make it a part of the head"
            )
    return kind(model, config)


# ------------------------------------------------------------------------------------------------- LyCORIS


def locon(asked: Asked, target_modules: Any = None, lora_dim: int | None = None, **options: Any) -> Adapted:
    """LyCORIS' LoCon, a Tucker core in every convolution: FLoRA at full kernel ranks."""
    try:
        from lycoris import LoConModule
    except ImportError:
        raise LeftOut("lycoris-lora is not installed") from None
    known = set(inspect.signature(LoConModule).parameters)
    for name in options:
        if name not in known:  # it takes them in silence
            raise TypeError(f"LoConModule got an unexpected keyword argument {name!r}")
    layers, notes = asked.layers(_LOCON, target_modules)

    def build(rank: int) -> dict[str, nn.Module]:
        fields = {"alpha": rank, "use_tucker": True, "bypass_mode": False, **options}
        return {
            name: LoConModule(name.replace(".", "_"), layer, lora_dim=rank, **fields) for name, layer in layers.items()
        }

    def count(rank: int) -> int:
        with torch.device("meta"):
            return sum(map(trainable, build(rank).values()))

    rank = lora_dim or fitting(count, asked.budget, "LoCon of rank")
    asked.train_head_only()
    for name, adapter in build(rank).items():
        layers[name].add_module("locon", adapter.to(layers[name].weight.device))
        adapter.apply_to()
    return Adapted(asked.model, [f"rank {rank} on {len(layers)} layers", *notes])


# ------------------------------------------------------------------------------------------------- FLoRA


def flora(asked: Asked, **options: Any) -> Adapted:
    fields = {"target_modules": asked.targets, **options}
    if not {"r", "budget"} & options.keys():
        ones = FloraConfig(r=1, **{"kernel_rank": 1, **fields}, modules_to_save=asked.head or None)
        if (least := library.plan(asked.model, ones).total) > asked.budget:
            too_small("FLoRA of rank", least, asked.budget)
        fields["budget"] = asked.budget
    config = FloraConfig(**fields, modules_to_save=asked.head or None)
    plan = library.plan(asked.model, config)
    model = _wrap(asked, asked.model, config)
    start = partial(_from_gradient, model) if config.init == "gradient" else None
    return Adapted(model, [f"ranks {_ranks(plan)}"], start=start)


@torch.no_grad()
def _from_gradient(model: nn.Module, batches: Iterable[dict]) -> None:
    """With the gradient that training sees first: in training mode, but running statistics stay as they are."""
    mode, before = model.training, [buffer.clone() for buffer in model.buffers()]
    library.initialize(model.train(), batches, loss=lambda model, batch: model(**batch)["loss"])
    model.train(mode)
    for buffer, kept in zip(model.buffers(), before, strict=True):
        buffer.copy_(kept)


def _ranks(plan: Any) -> str:
    """The different ranks, each with its number of weights."""
    counts = Counter("×".join(map(str, row.ranks)) for row in plan.rows)
    return shortened([f"{ranks} ({count})" for ranks, count in counts.most_common()])


METHODS: dict[str, Way] = {
    "full": Way(full, "full fine-tuning"),
    "head": Way(head_only, "head only"),
    "bitfit": Way(bitfit, "BitFit"),
    "houlsby": Way(houlsby, "Houlsby adapter", "width"),
    "pfeiffer": Way(pfeiffer, "Pfeiffer adapter", "width"),
    "lora": Way(lora, "LoRA", "r"),
    "dora": Way(dora, "DoRA", "r"),
    "adalora": Way(adalora, "AdaLoRA", "target_r"),
    "loha": Way(loha, "LoHa", "r"),
    "lokr": Way(lokr, "LoKr", "r"),
    "locon": Way(locon, "LoCon, Tucker", "lora_dim"),
    "flora": Way(flora, "FLoRA", "r"),
}
