"""A pre-trained backbone for dense prediction: its feature maps go to a segmentation or detection head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import HEADS
from flora_lab.tasks.models.pretrained import Pretrained, brief, load_weights, make_config

if TYPE_CHECKING:
    from torch import nn

TIMM = "timm/"
AFTER_MAPS = ("conv_head", "bn2")  # what an EfficientNet has between its last map and its classifier


def load_backbone(keys: Pretrained) -> nn.Module:
    """transformers' AutoBackbone of a classifier, or timm's if the name is "timm/NAME". A vision transformer that has
    none, also that of a vision-language model, becomes a pyramid.

    It returns the maps of four stages (all, if there are fewer), evenly spaced and fine to coarse, unless the config
    has out_features or out_indices. Raises ValueError naming the key of the model, or the file of its weights.
    """
    from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig, TimmBackboneConfig

    from flora_lab.tasks.models import cifar_resnet, vit_pyramid

    keys.check()
    cifar_resnet.register()
    vit_pyramid.register()
    try:
        if keys.name and keys.name.startswith(TIMM):
            config = TimmBackboneConfig(backbone=keys.name.removeprefix(TIMM), out_indices=[-4, -3, -2, -1])
            return AutoBackbone.from_config(config, pretrained=True)
        if keys.name:
            source = keys.source()
            config = AutoConfig.from_pretrained(source)
            if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
                return vit_pyramid.from_source(source, config)
            config.out_indices = stages(config)
            # AutoBackbone.from_pretrained would ask the hub even for a folder
            return MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(source, config=config)
        config = make_config(keys.config)
        if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
            return vit_pyramid.over(config, keys.weights)
        if not {"out_features", "out_indices"} & keys.config.keys():
            config.out_indices = stages(config)
        model = AutoBackbone.from_config(config)
    except Exception as error:  # a model's own code may raise anything
        raise keys.fault(brief(error, keys.name)) from error
    if keys.weights:
        load_weights(model, keys.weights, (*HEADS, *AFTER_MAPS))
    return model


def stages(config: Any) -> list[int]:
    """Indices of up to four stages, evenly spaced, the last one included."""
    names = getattr(config, "stage_names", None)
    if not names:  # timm's are known only when the model is built
        return [-4, -3, -2, -1]
    last = len(names) - 1  # the first is the stem
    step = max(last // 4, 1)
    return list(range(last % step + step, last + 1, step))


def map_layers(model: nn.Module) -> list[str]:
    """Names of what a backbone applies to its maps only: norms, or a pyramid's convolutions. Classifiers lack their
    weights."""
    from flora_lab.tasks.models.vit_pyramid import VitPyramid

    norms = [name for name, _ in model.named_modules() if name.split(".")[-2:-1] == ["hidden_states_norms"]]
    return norms + [f"{name}.neck" for name, module in model.named_modules() if isinstance(module, VitPyramid)]
