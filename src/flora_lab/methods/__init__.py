"""The registry of fine-tuning methods: one row of `METHODS` per method, for comparisons and benchmarks alike.

`adapt` sets a model up for one method at one budget. Every method gets the same targets, adapts those that it supports
and names the others in its notes. budget.py defines "equal parameters". Every method trains the head.

A new method is one function (a `Request` and the method's options in, an `AdaptedModel` out) and one row. A method that
PEFT has is `with_peft.at_rank` with its config class; one that PEFT has as an option of LoRA is a row alone.

Importing this package loads neither torch nor PEFT: a command's help, a typo and a report need not wait for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from flora_lab.methods.common import AdaptedModel, CannotAdapt, Request, head_parameters

__all__ = ["METHODS", "AdaptedModel", "CannotAdapt", "Method", "Request", "adapt", "head_parameters"]


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    Attributes:
        build: sets a request's model up; its keyword arguments are the method's options.
        label: the name in tables and figures.
        size: the option that fixes the adapter's size in place of a budget; None: the method has no size to choose.
        options: defaults of the method's options.
        per_mode: ``size`` may also be a list, one rank per mode.
        changes_base: the method changes the base model's own weights, at its start or in training. Whoever measures its
            updates needs a copy of them.
    """

    build: Callable[..., AdaptedModel]
    label: str
    size: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_mode: bool = False
    changes_base: bool = False


def _function(place: str) -> Callable[..., AdaptedModel]:
    """The function at "MODULE.NAME" in this package, whose module is imported when the function is called."""
    module, _, name = place.rpartition(".")

    def build(request: Request, **options: Any) -> AdaptedModel:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(request, **options)

    return build


METHODS: dict[str, Method] = {
    "full": Method(_function("without_adapter.full"), "full fine-tuning", changes_base=True),
    "head": Method(_function("without_adapter.head_only"), "head only"),
    "bitfit": Method(_function("without_adapter.bitfit"), "BitFit"),
    "houlsby": Method(_function("adapters.houlsby"), "Houlsby adapter", "width"),
    "pfeiffer": Method(_function("adapters.pfeiffer"), "Pfeiffer adapter", "width"),
    "lora": Method(_function("with_peft.lora"), "LoRA", "r"),
    "dora": Method(_function("with_peft.lora"), "DoRA", "r", {"use_dora": True}),
    "rslora": Method(_function("with_peft.lora"), "rsLoRA", "r", {"use_rslora": True, "lora_alpha": 16}),
    "loraplus": Method(_function("lora_variants.loraplus"), "LoRA+", "r"),
    "pissa": Method(_function("with_peft.lora"), "PiSSA", "r", {"init_lora_weights": "pissa"}, changes_base=True),
    "olora": Method(_function("with_peft.lora"), "OLoRA", "r", {"init_lora_weights": "olora"}, changes_base=True),
    "orthogonal": Method(_function("with_peft.lora"), "LoRA, orthogonal", "r", {"init_lora_weights": "orthogonal"}),
    "eva": Method(_function("lora_variants.eva"), "EVA", "r"),
    "lora_ga": Method(_function("lora_variants.lora_ga"), "LoRA-GA", "r", changes_base=True),
    "corda": Method(_function("lora_variants.corda"), "CorDA", "r", changes_base=True),
    "adalora": Method(_function("adalora.adalora"), "AdaLoRA", "target_r"),
    "loha": Method(_function("with_peft.loha"), "LoHa", "r"),
    "lokr": Method(_function("with_peft.lokr"), "LoKr", "r"),
    "hira": Method(_function("with_peft.hira"), "HiRA", "r"),
    "gralora": Method(_function("with_peft.gralora"), "GraLoRA", "r"),
    "miss": Method(_function("with_peft.miss"), "MiSS", "r"),
    "oft": Method(_function("with_peft.oft"), "OFT", "oft_block_size"),
    "locon": Method(_function("with_lycoris.locon"), "LoCon, Tucker", "lora_dim"),
    "flora": Method(_function("with_flora.flora"), "FLoRA", "r", per_mode=True),
}


def __getattr__(name: str) -> Any:
    """The public names of `common`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.common"), name)


def adapt(
    method: str | Method,
    model: nn.Module,
    head: Sequence[str],
    budget: int,
    options: Mapping[str, Any],
    *,
    target_modules: str | Sequence[str] | None = None,
    target_parameters: Sequence[str] | None = None,
    steps: int = 1000,
) -> AdaptedModel:
    """Set ``model`` up, in place, for training with one method.

    Args:
        method: a key of `METHODS`, or a row of one's own.
        head: names of the modules to train in full.
        budget: trainable parameters of the adapter, without the head's; unused where options fix the size.
        options: the method's options (`Method.build`); the one that `Method.size` names replaces the budget.
        target_modules: layers to adapt, as FloraConfig takes them. Default: "all-weights", unless target_parameters
            are given. An option of that name overrides it.
        target_parameters: raw parameters to adapt, as FloraConfig takes them.
        steps: optimizer steps of the training, for schedules such as AdaLoRA's.

    Raises:
        CannotAdapt: the method does not support this model, such as one of quantized weights, or the budget is too
            small for it.
        ValueError, TypeError: an unknown method, head or option, or a value that is not accepted.
    """
    from flora.tuner.checks import check_rank
    from flora_lab.methods.common import Request, built, head_parameters, trainable

    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
        method = METHODS[method]
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules:
            raise ValueError(f"head {name!r}: the model has no such module")
    if method.size in options:
        check_rank(method.size, options[method.size], many=method.per_mode)
    elif method.size:
        check_rank("budget", budget, many=False)
    if not target_modules and not target_parameters:
        target_modules = "all-weights"
    request = Request(model, list(head), budget, steps, target_modules, target_parameters)
    head_size = head_parameters(model, head)  # before PEFT renames the head's modules
    adapted = built(partial(method.build, **{**method.options, **options}), request)
    if adapted.parameters is None:
        adapted = replace(adapted, parameters=trainable(adapted.model) - head_size)
    return adapted
