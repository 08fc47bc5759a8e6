"""A plain vision transformer as a backbone: its layers' tokens as maps."""

import os
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from flora_lab.methods import adapt
from flora_lab.tasks.models.backbone import load_backbone, map_layers
from flora_lab.tasks.models.pretrained import Pretrained
from flora_lab.tasks.models.vit_pyramid import VitPyramid, VitPyramidConfig
from flora_lab.tasks.semantic_segmentation import Scenes, SemanticSegmentation
from processes import START

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


def trained_upernet(folder: Path, sharded: bool) -> None:
    """Two steps of the InternViT job's model with FLoRA. Rank 0 writes what was trained, whole."""
    torch.manual_seed(0)
    backbone = Pretrained(config={"model_type": "internvl_vision", **TINY})
    task = SemanticSegmentation(model=Pretrained(config={"hidden_size": 8}), backbone=backbone, data=Scenes(classes=3))
    model = task.build()
    model = adapt("flora", model, task.head(model), 4000, {}).model.double().train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("tucker" in name for name in trained) and any("decode_head" in name for name in trained)
    if sharded:
        layers = [module for name, module in model.named_modules() if re.search(r"\.layers?\.\d+$", name)]
        assert len(layers) == TINY["num_hidden_layers"]
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (2, 28, 28), generator=generator)
    for _ in range(2):  # all processes have the same pictures, so that batch normalisation has the same means
        model(pixel_values=pixels, labels=labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not sharded or dist.get_rank() == 0:
        torch.save({name: state[name] for name in trained}, folder / f"{sharded}.pt")


def in_two_processes(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=300), rank=rank, world_size=2)
    trained_upernet(folder, sharded=True)
    dist.destroy_process_group()


def test_sharded_by_fsdp2_it_trains_as_in_one_process(tmp_path):
    torch.multiprocessing.start_processes(in_two_processes, (tmp_path,), nprocs=2, start_method=START)
    trained_upernet(tmp_path, sharded=False)
    got, want = torch.load(tmp_path / "True.pt"), torch.load(tmp_path / "False.pt")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
