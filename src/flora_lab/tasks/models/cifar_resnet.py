"""The ResNet for CIFAR of He et al. 2015 (section 4.2) as a transformers model.

Three stages of 3×3 convolutions; shortcuts without weights (option A): every second pixel, channels padded with zeros.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput


class CifarResNetConfig(BackboneConfigMixin, PreTrainedConfig):
    model_type = "cifar_resnet"

    def __init__(
        self,
        depth: int = 56,
        widths: tuple[int, ...] = (16, 32, 64),
        num_channels: int = 3,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: expected 6 n + 2, such as 20, 32, 44, 56 or 110")
        self.depth, self.widths, self.num_channels = depth, list(widths), num_channels
        self.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, len(self.widths) + 1))]
        self.set_output_features_output_indices(out_features, out_indices)
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.padding:
            before = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.padding - before))
        return F.relu(y + x)


class CifarResNet(PreTrainedModel):
    """The stem and the stages; the maps of stage n have stride 2 ** (n - 1)."""

    config_class = CifarResNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        width = config.widths[0]
        self.conv1 = nn.Conv2d(config.num_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage, wider in enumerate(config.widths, start=1):
            blocks = []
            for block in range((config.depth - 2) // 6):
                blocks.append(Block(width, wider, 2 if stage > 1 and block == 0 else 1))
                width = wider
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)

    def maps(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The outputs of the stem and of each stage."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        yield x
        for stage in range(1, len(self.config.widths) + 1):
            x = getattr(self, f"layer{stage}")(x)
            yield x


class CifarResNetForImageClassification(CifarResNet):
    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.linear = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        *_, x = self.maps(pixel_values)
        logits = self.linear(x.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class CifarResNetBackbone(BackboneMixin, CifarResNet):
    has_attentions = False

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_features = [config.widths[0], *config.widths]
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        maps = zip(self.stage_names, self.maps(pixel_values), strict=True)
        return BackboneOutput(feature_maps=tuple(x for stage, x in maps if stage in self.out_features))


def register() -> None:
    AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
    AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
    AutoBackbone.register(CifarResNetConfig, CifarResNetBackbone, exist_ok=True)
