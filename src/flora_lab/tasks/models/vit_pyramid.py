"""A plain vision transformer as a backbone for dense prediction.

The tokens of four of its layers become maps of strides p/4, p/2, p and 2p, for patches of p pixels: by two transposed
convolutions, by one, as they are, and by pooling, as BEiT and InternViT feed an UperNet. The convolutions are new.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from flora_lab.tasks.models.pretrained import load_weights

MAPS = 4
TOWER = r"^(model\.)?vision_(tower|model)\."  # where a vision-language model has its vision transformer


class VitPyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """``encoder``: the transformer's config. By default the maps come from the ends of its four quarters."""

    model_type = "vit_pyramid"

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        layers = encoder.num_hidden_layers if encoder else MAPS
        self.stage_names = ["stem", *(f"layer{layer}" for layer in range(1, layers + 1))]
        if out_features is None and out_indices is None:
            out_indices = [round(layers * quarter / MAPS) for quarter in range(1, MAPS + 1)]
        self.set_output_features_output_indices(out_features, out_indices)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "encoder": self.encoder.to_dict() if self.encoder else None}

    def shallow(self) -> VitPyramidConfig:
        """The same channels from a transformer of few layers, for whoever needs their number only."""
        encoder = deepcopy(self.encoder)
        encoder.num_hidden_layers = MAPS
        return VitPyramidConfig(encoder)


class Neck(nn.Module):
    """Maps of one size -> four, fine to coarse."""

    def __init__(self, width: int):
        super().__init__()
        twice = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(3)]
        self.first = nn.Sequential(twice[0], nn.BatchNorm2d(width), nn.GELU(), twice[1])
        self.second = twice[2]

    def forward(self, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> tuple[Tensor, ...]:
        return self.first(first), self.second(second), third, F.max_pool2d(fourth, 2)


class VitPyramid(BackboneMixin, PreTrainedModel):
    """Raises ValueError unless the config names four layers."""

    config_class = VitPyramidConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    has_attentions = False
    supports_gradient_checkpointing = True

    def __init__(self, config: VitPyramidConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        if len(config.out_indices) != MAPS:
            raise ValueError(f"out_indices={config.out_indices}: a vision transformer gives {MAPS} maps")
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        width = config.encoder.hidden_size
        self.num_features = [width] * len(config.stage_names)
        self.neck = Neck(width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # torch's own for the new layers; the transformer has had its own

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """pixel_values (batch, channels, height, width), multiples of the patch -> four maps, fine to coarse."""
        states = self.encoder(pixel_values, output_hidden_states=True, **self._options()).hidden_states
        high, wide = _pair(self.config.encoder.patch_size)
        rows, columns = pixel_values.shape[-2] // high, pixel_values.shape[-1] // wide
        patches = [states[index][:, -rows * columns :] for index in self.config.out_indices]  # other tokens come first
        maps = self.neck(*(tokens.mT.reshape(len(tokens), -1, rows, columns) for tokens in patches))
        return BackboneOutput(feature_maps=maps)

    def _options(self) -> dict[str, bool]:
        """For transformers that take pictures of one size only, unless told to interpolate."""
        known = inspect.signature(self.encoder.forward).parameters
        return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def over(config: PreTrainedConfig, weights: str | None) -> VitPyramid:
    """The pyramid over a vision transformer of this config, with the weights of a file."""
    _check(config)
    encoder = AutoModel.from_config(config)
    if weights:
        load_weights(encoder, weights, ())
    return VitPyramid(VitPyramidConfig(config), encoder)


def from_source(source: str, config: PreTrainedConfig) -> VitPyramid:
    """The pyramid over a vision transformer, or over that of a vision-language model.

    Raises ValueError for a model that is neither.
    """
    vision = getattr(config, "vision_config", config)
    _check(vision)
    mapping = {} if vision is config else {"key_mapping": {TOWER: ""}}
    encoder = AutoModel.from_pretrained(source, config=vision, dtype=torch.float32, **mapping)
    return VitPyramid(VitPyramidConfig(encoder.config), encoder)


def _check(config: PreTrainedConfig) -> None:
    missing = [name for name in ("patch_size", "hidden_size", "num_hidden_layers") if not hasattr(config, name)]
    if missing:
        kind = config.model_type
        raise ValueError(f"transformers has no backbone for model_type {kind}, and its config has no {missing[0]}")


def register() -> None:
    AutoConfig.register(VitPyramidConfig.model_type, VitPyramidConfig, exist_ok=True)
    AutoBackbone.register(VitPyramidConfig, VitPyramid, exist_ok=True)
