"""A pre-trained body for dense prediction, whose maps a segmentation or detection head reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from flora_lab.tasks.base import HEADS
from flora_lab.tasks.pretrained import Pretrained, brief, load_weights, make_config

TIMM = "timm/"


def load_backbone(keys: Pretrained) -> nn.Module:
    """transformers' AutoBackbone of a classifier, or timm's where the name is "timm/NAME".

    It gives the maps of four stages (of all, where there are fewer), evenly spaced and fine to coarse, unless the
    config has its own out_features or out_indices. Raises ValueError naming the model, or the file of its weights.
    """
    from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig, TimmBackboneConfig

    from flora_lab.tasks import cifar_resnet

    keys.check()
    cifar_resnet.register()
    try:
        if keys.name and keys.name.startswith(TIMM):
            config = TimmBackboneConfig(backbone=keys.name.removeprefix(TIMM), out_indices=[-4, -3, -2, -1])
            return AutoBackbone.from_config(config, pretrained=True)
        if keys.name:
            config = AutoConfig.from_pretrained(keys.name)
            if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
                raise ValueError(f"transformers has no backbone for model_type {config.model_type}")
            config.out_indices = stages(config)
            # not AutoBackbone.from_pretrained, which asks the hub even for a folder
            return MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(keys.name, config=config)
        config = make_config(keys.config)
        if not {"out_features", "out_indices"} & keys.config.keys():
            config.out_indices = stages(config)
        model = AutoBackbone.from_config(config)
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(f"{keys.name or keys.config['model_type']}: {brief(error)}") from error
    if keys.weights:
        load_weights(model, keys.weights, HEADS)
    return model


def stages(config: Any) -> list[int]:
    names = getattr(config, "stage_names", None)
    if not names:  # timm's, which are known once it is built
        return [-4, -3, -2, -1]
    last = len(names) - 1  # the first is the stem
    step = max(last // 4, 1)
    return list(range(last % step + step, last + 1, step))


def map_norms(model: nn.Module) -> list[str]:
    """Names of the norms that a transformers backbone has for its maps only: no classifier brings their weights."""
    return [name for name, _ in model.named_modules() if name.split(".")[-2:-1] == ["hidden_states_norms"]]
