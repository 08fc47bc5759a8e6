"""What is compared: one function a method in `METHODS`, from a frozen model to the model that is trained.

Each takes a copy of the model that shares its weights, the fields of a PEFT config that say what to adapt, and the
number of trainable parameters. Ranks are solved for, to come as near that number as can be.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import flora
from flora import FloraConfig
from flora_lab.methods.common import CannotAdapt as LeftOutError
from flora_lab.methods.common import copied, on_meta, trainable

Targets = Mapping[str, Any]
MAX_RANK = 256
LOKR_FACTORS = (16, 8, 4, 2)
AUTHORS_SCALE = 0.4
NOISE = 0.02


@dataclass(frozen=True)
class Adapted:
    """The model to train, and its ranks for the reader."""

    model: nn.Module
    ranks: str = ""

    @property
    def parameters(self) -> int:
        return trainable(self.model)


def adapt(name: str, model: nn.Module, targets: Targets, parameters: int, seed: int) -> Adapted:
    """``model`` adapted by a method, its weights shared and away from the start, where some tensors are all zero."""
    torch.manual_seed(seed)
    adapted = METHODS[name](copied(model), targets, parameters)
    if name != "full":
        disturb(adapted.model)
    return adapted


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Small noise on everything that is trained: nothing is zero, and DoRA's magnitudes keep their size."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)


def lora_parameters(model: nn.Module, targets: Targets, rank: int) -> int:
    """The reference count: what LoRA of that rank trains."""
    return trainable(get_peft_model(copied(model, on_meta), LoraConfig(r=rank, **targets)))


def nearest_rank(count: Callable[[int], int], parameters: int) -> int:
    """The least rank whose ``count``, which grows with it, is as near to ``parameters`` as any."""
    count, ranks = cache(count), range(1, MAX_RANK + 1)
    within = bisect_right(ranks, parameters, key=count)
    nearest = min(ranks[max(within - 1, 0) : within + 1], key=lambda rank: abs(count(rank) - parameters))
    return ranks[bisect_left(ranks, count(nearest), key=count)]


# ------------------------------------------------------------------------------------------------- the two ends


def floor(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    """The frozen model, gradients flowing to its input."""
    return Adapted(model)


def full(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    """Every parameter is trained, in a copy of its own."""
    return Adapted(copy.deepcopy(model).requires_grad_(True))


# ------------------------------------------------------------------------------------------------- PEFT's own


def lora(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    return _nearest(model, parameters, [partial(LoraConfig, **targets)])


def dora(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    return _nearest(model, parameters, [partial(LoraConfig, use_dora=True, **_layers_only(targets))])


def loha(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    return _nearest(model, parameters, [partial(LoHaConfig, use_effective_conv2d=True, **_layers_only(targets))])


def lokr(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    """A Kronecker product holds few parameters, so its factor is chosen too."""
    options = {"use_effective_conv2d": True, **_layers_only(targets)}
    return _nearest(model, parameters, [partial(LoKrConfig, decompose_factor=f, **options) for f in LOKR_FACTORS])


def _nearest(model: nn.Module, parameters: int, configs: list[Callable[..., PeftConfig]]) -> Adapted:
    """The model under the config, and at the rank, that come nearest to the number of parameters."""

    def count(config: Callable[..., PeftConfig], rank: int) -> int:
        with torch.device("meta"):
            return trainable(get_peft_model(copied(model, on_meta), config(r=rank)))

    solved = [(config, nearest_rank(partial(count, config), parameters)) for config in configs]
    config, rank = min(solved, key=lambda pair: abs(count(*pair) - parameters))
    chosen = config(r=rank)
    factor = getattr(chosen, "decompose_factor", None)
    return Adapted(get_peft_model(model, chosen), f"{rank}" + (f", factor {factor}" if factor else ""))


def _layers_only(targets: Targets) -> Targets:
    if "target_parameters" in targets:
        raise LeftOutError("it adapts layers, no raw parameters")
    return targets


def _adapted_weights(model: nn.Module, targets: Targets, parameters: int) -> list[Any]:
    """The rows of FLoRA's plan: which layers the targets name, and ranks within the number of parameters."""
    return flora.plan(model, FloraConfig(budget=parameters, **targets)).rows


# ------------------------------------------------------------------------------------------------- LyCORIS


class Beside(nn.Module):
    """A model whose layers run through ``adapters`` that are no part of it."""

    def __init__(self, model: nn.Module, adapters: list[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.adapters = nn.ModuleList(adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def locon(model: nn.Module, targets: Targets, parameters: int, bypass: bool = False) -> Adapted:
    """LyCORIS' LoCon, a Tucker core in every convolution; with ``bypass`` as thin layers, else through the delta."""
    try:
        from lycoris import LoConModule
    except ImportError:
        raise LeftOutError("lycoris-lora is not installed") from None
    names = [row.module for row in _adapted_weights(model, _layers_only(targets), parameters)]

    def adapters(rank: int) -> list[nn.Module]:
        options = {"lora_dim": rank, "alpha": rank, "use_tucker": True, "bypass_mode": bypass}
        return [LoConModule(name.replace(".", "_"), model.get_submodule(name), **options) for name in names]

    def count(rank: int) -> int:
        with torch.device("meta"):
            return sum(map(trainable, adapters(rank)))

    rank = nearest_rank(count, parameters)
    chosen = adapters(rank)
    for adapter in chosen:
        adapter.to(adapter.org_weight.device).apply_to()
    return Adapted(Beside(model, chosen), f"{rank}")


# ------------------------------------------------------------------------------------------------- FLoRA


class AuthorsLayer(nn.Module):
    """The paper's layer taken literally (equations 5 to 7): the whole delta is built in each step, and run as a second
    layer beside the base layer."""

    def __init__(self, base: nn.Linear | nn.Conv2d, ranks: tuple[int, ...]) -> None:
        super().__init__()
        shape, like = base.weight.shape, {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.core = nn.Parameter(torch.zeros(ranks, **like))
        factors = (torch.randn(size, rank, **like) * rank**-0.5 for size, rank in zip(shape, ranks, strict=True))
        self.factors = nn.ParameterList(factors)
        inner, outer = ascii_lowercase[: len(shape)], ascii_uppercase[: len(shape)]
        pairs = ",".join(large + small for large, small in zip(outer, inner, strict=True))
        self.equation = f"{inner},{pairs}->{outer}"

    def forward(self, input: Tensor) -> Tensor:
        delta = torch.einsum(self.equation, self.core, *self.factors) * AUTHORS_SCALE
        run = F.linear if isinstance(self.base, nn.Linear) else self.base._conv_forward
        return self.base(input) + run(input, delta, None)


def authors(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    """Written anew from the paper, at the ranks that FLoRA has."""
    rows = _adapted_weights(model, _layers_only(targets), parameters)
    for row in rows:
        model.set_submodule(row.module, AuthorsLayer(model.get_submodule(row.module), row.ranks))
    return Adapted(model, _summary(rows))


def flora_as(model: nn.Module, targets: Targets, parameters: int, **options: Any) -> Adapted:
    config = FloraConfig(budget=parameters, **targets, **options)
    ranks = _summary(flora.plan(model, config).rows)
    return Adapted(get_peft_model(model, config), ranks)


def flora_k3(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    """The kernel modes of 3×3 convolutions at full rank."""
    if not any(row.shape[2:] == (3, 3) for row in _adapted_weights(model, targets, parameters)):
        raise LeftOutError("no 3×3 convolution is adapted")
    return flora_as(model, targets, parameters, kernel_rank=3)


def flora_all(model: nn.Module, targets: Targets, parameters: int) -> Adapted:
    """The depthwise kernels too, which the others leave out: at the same number of parameters."""
    if all(getattr(layer, "groups", 1) == 1 for layer in model.modules()):
        raise LeftOutError("there is no depthwise convolution")
    return flora_as(model, {"target_modules": "all-weights"}, parameters)


def _summary(rows: list[Any]) -> str:
    """The different ranks, each with its number of weights."""
    counts = Counter("×".join(map(str, row.ranks)) for row in rows)
    return ", ".join(f"{ranks} ({count})" for ranks, count in counts.items())


METHODS: dict[str, Callable[[nn.Module, Targets, int], Adapted]] = {
    "floor": floor,
    "full": full,
    "lora": lora,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "locon": locon,
    "locon-bypass": partial(locon, bypass=True),
    "authors": authors,
    "flora-auto": partial(flora_as, execution="auto"),
    "flora-factored": partial(flora_as, execution="factored"),
    "flora-merged": partial(flora_as, execution="merged"),
    "flora-k3": flora_k3,
    "flora-all": flora_all,
}
