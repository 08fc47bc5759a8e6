"""flora: low-rank core space adapters (FLoRA, arXiv 2405.14739) for weights of any number of dimensions.

Importing it makes FLORA known to PEFT: ``get_peft_model(model, FloraConfig(...))``. PEFT takes seconds to import, so
neither it nor the names below are loaded before something asks for them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora.layers.core_space import CoreSpace
    from flora.tuner.config import FloraConfig
    from flora.tuner.gradient import initialize
    from flora.tuner.hotswap import hotswap
    from flora.tuner.layer import FloraLayer
    from flora.tuner.model import FloraModel
    from flora.tuner.planning import plan
    from flora.tuner.trainer import Initialize

__version__ = "0.1.0"
__all__ = ["CoreSpace", "FloraConfig", "FloraLayer", "FloraModel", "Initialize", "hotswap", "initialize", "plan"]

_HOMES = {
    "CoreSpace": "layers.core_space",
    "FloraConfig": "tuner.config",
    "FloraLayer": "tuner.layer",
    "FloraModel": "tuner.model",
    "Initialize": "tuner.trainer",
    "hotswap": "tuner.hotswap",
    "initialize": "tuner.gradient",
    "plan": "tuner.planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flora' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"flora.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterPeft:
    """Imports ``flora.tuner``, which registers FLORA, as soon as PEFT has been imported: an import hook."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(cls)
        spec = find_spec("peft")
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                importlib.import_module("flora.tuner")

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("flora.tuner")
else:
    sys.meta_path.insert(0, _AfterPeft)
