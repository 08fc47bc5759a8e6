"""diffusers' ways of saving a LoRA, which write whatever adapter a model has: a FLORA adapter they refuse."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from flora.tuner.peft_compat import FLORA, PREFIX

_WAY_OUT = (
    "is a FLORA adapter, and this file is for LoRA. Save it with peft's `get_peft_model(model, config)` and "
    "`save_pretrained`; `flora export lora` makes an exact LoRA of that"
)


def refuse_lora_files(model: nn.Module) -> None:
    """If the model is one of diffusers': let ``save_lora_adapter`` and the pipelines' ``save_lora_weights`` raise
    ValueError for FLORA. They would write a file that nothing reads."""
    mixin: Any = next((cls for cls in type(model).__mro__ if "save_lora_adapter" in vars(cls)), None)
    if mixin is None or not mixin.__module__.startswith("diffusers."):
        return
    from diffusers.loaders.lora_base import LoraBaseMixin

    def of_model(given: dict[str, Any]) -> str | None:
        configs = getattr(given["self"], "peft_config", {})
        names = configs if given["adapter_name"] is None else [given["adapter_name"]]
        return next((n for n in names if getattr(configs.get(n), "peft_type", None) == FLORA), None)

    def of_tensors(given: dict[str, Any]) -> str | None:
        return next((key for key in given["state_dict"] if PREFIX in key), None)

    _guard(mixin, "save_lora_adapter", of_model)
    _guard(LoraBaseMixin, "write_lora_layers", of_tensors)


def _guard(cls: Any, name: str, find: Callable[[dict[str, Any]], str | None]) -> None:
    """Let a method raise ValueError where ``find`` finds a FLORA adapter in its arguments; once."""
    own = inspect.getattr_static(cls, name)
    save = own.__func__ if isinstance(own, staticmethod) else own
    if hasattr(save, "refuses_flora"):
        return
    signature = inspect.signature(save)

    @functools.wraps(save)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        found = find(given.arguments)
        if found is not None:
            raise ValueError(f"{found!r} {_WAY_OUT}")
        return save(*args, **kwargs)

    guarded.refuses_flora = True  # type: ignore[attr-defined]
    setattr(cls, name, staticmethod(guarded) if isinstance(own, staticmethod) else guarded)
