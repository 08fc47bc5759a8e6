"""The only file that touches PEFT's internals and the differences between its versions."""

from __future__ import annotations

from typing import Union

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.integrations import gather_params_ctx
from peft.utils.peft_types import PeftType

PREFIX = "tucker_"
# PEFT 0.20 leaves trained biases out of an adapter's file, for every method but its own LoRA
SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")

__all__ = ["FLORA", "PREFIX", "SAVES_BIASES", "gather_params_ctx", "register"]


def _enum_member(name: str) -> PeftType:
    """A real member of PEFT's enum: a plain string would break every ``.value`` in PEFT and transformers."""
    if name in PeftType.__members__:
        return PeftType[name]
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
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if FLORA in PEFT_TYPE_TO_TUNER_MAPPING:  # the module is being reloaded
        return
    register_peft_method(
        name="flora", config_cls=config_cls, model_cls=model_cls, prefix=PREFIX, is_mixed_compatible=True
    )
    _join_mixed_model(config_cls, model_cls, layer_cls)


def _join_mixed_model(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """PEFT's MixedModel knows its tuners by name, in module constants and by isinstance: add ours to each."""
    import peft.tuners.mixed as package
    import peft.tuners.mixed.model as module

    package.COMPATIBLE_TUNER_TYPES = module.COMPATIBLE_TUNER_TYPES = (*module.COMPATIBLE_TUNER_TYPES, FLORA)
    module.PREFIXES.append(PREFIX)
    module.Configs = Union[module.Configs, config_cls]  # noqa: UP007  PEFT reads its __args__
    module.Layers = (*module.Layers, layer_cls)

    def ours_for_our_config(method: str) -> None:
        theirs, ours = getattr(module.MixedModel, method), getattr(model_cls, method)

        def either(self, config, *args, **kwargs):
            return (ours if isinstance(config, config_cls) else theirs)(self, config, *args, **kwargs)

        setattr(module.MixedModel, method, either)

    for method in ("_prepare_model", "_create_and_replace", "_inject_parameters"):
        ours_for_our_config(method)
    inject = module.MixedModel.inject_adapter

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        # PeftMixedModel.add_adapter passes itself, which puts "base_model.model." before the name of every layer
        ours = isinstance(self.peft_config[adapter_name], config_cls)
        return inject(self, self.model if ours else model, adapter_name, *args, **kwargs)

    module.MixedModel.inject_adapter = inject_adapter
