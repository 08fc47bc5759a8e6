"""A plain vision transformer as a backbone: its layers' tokens as maps."""

import re

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from flora_lab.tasks.models.backbone import load_backbone, map_layers
from flora_lab.tasks.models.pretrained import Pretrained
from flora_lab.tasks.models.vit_pyramid import VitPyramid, VitPyramidConfig

TINY = {"hidden_size": 8, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
        "patch_size": 14}  # fmt: skip


@pytest.mark.parametrize("config", [InternVLVisionConfig, CLIPVisionConfig, SiglipVisionConfig])
def test_maps_are_the_tokens_at_the_quarters_of_the_depth(config):
    model = load_backbone(Pretrained(config={"model_type": config.model_type, **TINY})).eval()
    outputs = []
    for name, module in model.encoder.named_modules():
        if re.search(r"layers?\.[1357]$", name):
            module.register_forward_hook(lambda _, args, result: outputs.append(result))
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 28, 42)).feature_maps
        tokens = [(o[0] if isinstance(o, tuple) else o)[:, -6:].mT.reshape(2, 8, 2, 3) for o in outputs]
    torch.testing.assert_close(maps, model.neck(*tokens))
    assert [tuple(one.shape[2:]) for one in maps] == [(8, 12), (4, 6), (2, 3), (1, 1)]
    assert map_layers(torch.nn.ModuleDict({"backbone": model})) == ["backbone.neck"]


def test_a_vision_language_model_lends_its_vision_transformer(tmp_path):
    text = Qwen2Config(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = InternVLConfig(vision_config=InternVLVisionConfig(**TINY), text_config=text)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path)
    pyramid = load_backbone(Pretrained(name=str(tmp_path)))
    expected = whole.model.vision_tower.state_dict()
    torch.testing.assert_close(pyramid.encoder.state_dict(), expected)


def test_a_model_without_patches_is_refused():
    with pytest.raises(ValueError, match="no backbone for model_type gpt2, and its config has no patch_size"):
        load_backbone(Pretrained(config={"model_type": "gpt2"}))


def test_four_maps_are_needed():
    with pytest.raises(ValueError, match=r"out_indices=\[2, 4\]: a vision transformer gives 4 maps"):
        VitPyramid(VitPyramidConfig(CLIPVisionConfig(**TINY), out_indices=[2, 4]))


def test_the_config_comes_back_from_json():
    config = VitPyramidConfig(CLIPVisionConfig(**TINY))
    again = VitPyramidConfig.from_dict(config.to_dict())
    assert again.encoder.to_dict() == config.encoder.to_dict() and again.out_indices == [2, 4, 6, 8]
    assert again.shallow().encoder.hidden_size == 8
