"""flora: low-rank core space adapters (FLoRA, arXiv 2405.14739) for weights of any number of dimensions.

Importing it makes FLORA known to PEFT: ``get_peft_model(model, FloraConfig(...))``. PEFT takes seconds to import, so
neither it nor the names below are loaded before something asks for them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora.layers.core_space import CoreSpace
    from flora.tuner.config import FloraConfig
    from flora.tuner.data_start.initialize import initialize
    from flora.tuner.data_start.trainer import Initialize
    from flora.tuner.hotswap import hotswap
    from flora.tuner.layer import FloraLayer
    from flora.tuner.model import FloraModel
    from flora.tuner.planning.plan import plan

__version__ = "0.1.0"
__all__ = ["CoreSpace", "FloraConfig", "FloraLayer", "FloraModel", "Initialize", "hotswap", "initialize", "plan"]

_HOMES = {
    "CoreSpace": "layers.core_space",
    "FloraConfig": "tuner.config",
    "FloraLayer": "tuner.layer",
    "FloraModel": "tuner.model",
    "Initialize": "tuner.data_start.trainer",
    "hotswap": "tuner.hotswap",
    "initialize": "tuner.data_start.initialize",
    "plan": "tuner.planning.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flora' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"flora.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterPeft:
    """An import hook: as soon as PEFT has been imported, it imports ``flora.tuner``, which registers FLORA."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """PEFT's spec, whose loader registers FLORA afterwards. Merely looking for PEFT leaves the hook in place."""
        if name != "peft":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                if cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                importlib.import_module("flora.tuner")

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("flora.tuner")
else:
    sys.meta_path.insert(0, _AfterPeft)
