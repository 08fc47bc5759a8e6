"""All that touches PEFT's internals, and the differences between its versions. Other files import them from here."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Union, cast

from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGET_MODULES
from peft.utils import _get_submodules as get_submodules
from peft.utils import register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES, SEQ_CLS_HEAD_NAMES
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from peft.utils.other import _set_adapter as set_auxiliary_adapter
from peft.utils.peft_types import PeftType
from peft.utils.save_and_load import load_peft_weights

from flora.files import replace_adapters
from flora.tuner.card import fill_card
from flora.tuner.undo import unchanged_on_error

PREFIX = "tucker_"
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# PEFT 0.20 saves trained biases only for its own LoRA
SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")

__all__ = [
    "DUMMY_TARGET_MODULES", "FLORA", "KEY_MAPPING", "PREFIX", "SAVES_BIASES", "SEQ_CLS_HEAD_NAMES", "TARGET_MODULES",
    "AuxiliaryTrainingWrapper", "BaseTuner", "BaseTunerLayer", "ModulesToSaveWrapper", "PlainNames",
    "check_adapters_to_merge", "check_target_module_exists", "get_pattern_key", "get_submodules", "init_empty_weights",
    "load_peft_weights", "register", "set_auxiliary_adapter",
]  # fmt: skip


class PlainNames:
    """A model as PEFT asks it for its modules, under the names that a state dict has: without those of FSDP1's and of
    activation checkpointing's wrappers. PEFT knows the outermost only, and would leave out what is inside others."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """As ``nn.Module.named_modules``."""
        for name, module in self.model.named_modules():
            yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


def _enum_member(name: str) -> PeftType:
    """A real member of PEFT's enum: a plain string would break every ``.value`` in PEFT and transformers.

    Raises ImportError if PEFT has a method of that name already.
    """
    if name in PeftType.__members__:
        raise ImportError(
            f"this PEFT already has a method {name}, which flora would replace: uninstall the package that adds it, or "
            "install a PEFT without it"
        )
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


FLORA = _enum_member("FLORA")


def register(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """Make ``config_cls`` and ``model_cls`` known to PEFT as FLORA, also to ``PeftMixedModel`` beside LoRA."""
    register_peft_method(
        name="flora", config_cls=config_cls, model_cls=model_cls, prefix=PREFIX, is_mixed_compatible=True
    )
    _join_mixed_model(config_cls, model_cls, layer_cls)
    _save_whole()
    _tell_key_mapping()


# the ``key_mapping`` of the ``from_pretrained`` or ``load_adapter`` that is running
KEY_MAPPING: ContextVar[Mapping[str, str] | None] = ContextVar("KEY_MAPPING", default=None)


def _tell_key_mapping() -> None:
    """Make PEFT's loading tell ``KEY_MAPPING``: it renames the weights only, after the layers have been wrapped."""

    def tells(load: Callable, default: str | None) -> Callable:
        signature = inspect.signature(load)

        @functools.wraps(load)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            mapping = given.get("key_mapping")
            if mapping is None and default is not None:
                mapping = getattr(given["model"], default, None)
            token = KEY_MAPPING.set(mapping)
            try:
                return load(*args, **kwargs)
            finally:
                KEY_MAPPING.reset(token)

        return wrapper

    loads = cast(Any, PeftModel.from_pretrained).__func__
    PeftModel.from_pretrained = classmethod(tells(loads, "_checkpoint_conversion_mapping"))
    PeftModel.load_adapter = tells(PeftModel.load_adapter, None)


def _save_whole() -> None:
    """Make ``PeftModel.save_pretrained`` replace a FLORA adapter whole or not at all, whenever the process is killed.
    PEFT writes weights and config over the old ones, one after the other. Other methods' adapters are saved as before.
    """
    save, model_card = PeftModel.save_pretrained, "README.md"
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        selected = given.get("selected_adapters") or self.peft_config
        ours = any(getattr(self.peft_config.get(name), "peft_type", None) == FLORA for name in selected)
        if not ours or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            return save(self, save_directory, *args, **kwargs)
        with replace_adapters(save_directory) as folder:
            card = Path(save_directory, model_card)
            if card.is_file():  # PEFT updates it
                shutil.copy(card, folder)
            save(self, str(folder), *args, **kwargs)
            adapters = [name for name in selected if self.peft_config[name].peft_type == FLORA]
            fill_card(Path(folder, model_card), self, adapters, fresh=not card.is_file())

    PeftModel.save_pretrained = save_pretrained


def _join_mixed_model(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """Add FLORA to the lists by which PEFT's MixedModel knows its tuners.

    A MixedModel becomes a ``MixedFloraModel`` when it gets its first FLORA adapter; one without stays as it is.
    """
    import peft.tuners.mixed as package
    import peft.tuners.mixed.model as module

    package.COMPATIBLE_TUNER_TYPES = module.COMPATIBLE_TUNER_TYPES = (*module.COMPATIBLE_TUNER_TYPES, FLORA)
    module.PREFIXES.append(PREFIX)
    module.Configs = Union[module.Configs, config_cls]  # noqa: UP007  PEFT reads its __args__
    module.Layers = (*module.Layers, layer_cls)

    theirs = module.MixedModel

    class MixedFloraModel(theirs):  # type: ignore[misc,valid-type]
        """A MixedModel that hands FLORA's adapters to ``FloraModel``."""

        def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
            with _all_names_kept(self.model):
                return super()._unload_and_optionally_merge(*args, **kwargs)

    def dispatch(method: str) -> None:
        def by_config(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
            tuner = model_cls if isinstance(config, config_cls) else theirs
            return getattr(tuner, method)(self, config, *args, **kwargs)

        setattr(MixedFloraModel, method, by_config)

    for method in ("_prepare_model", "_create_and_replace", "_inject_parameters"):
        dispatch(method)
    inject = theirs.inject_adapter

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.peft_config[adapter_name], config_cls):
            with _all_names_kept(self.model):
                return inject(self, model, adapter_name, *args, **kwargs)
        if type(self) is theirs:
            self.__class__ = MixedFloraModel
        # PeftMixedModel.add_adapter passes itself, which would put "base_model.model." before every layer's name
        with unchanged_on_error(self.model):
            inject(self, self.model, adapter_name, *args, **kwargs)
            model_cls._start(self, adapter_name)  # type: ignore[attr-defined]

    theirs.inject_adapter = inject_adapter


@contextmanager
def _all_names_kept(model: Any) -> Iterator[None]:
    """A layer that the model has under several names keeps them all: PEFT replaces it under the first one only."""
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer) and name.rpartition(".")[2] != "base_layer":
            names.setdefault(module, []).append(name)
    yield
    for first, *others in names.values():
        for other in others:
            parent, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_submodule(first))
