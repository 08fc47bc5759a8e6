"""Three people from the front page to a trained, exported adapter, by the lines that the pages have for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from lycoris import create_lycoris_from_weights
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from commands import flora
from flora import FloraConfig
from flora_lab.cli import init


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def done(result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def train(model: torch.nn.Module, loss) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_first_time_user_with_a_folder_of_images():
    for number in range(40):
        file = Path("photos", ("cat", "dog")[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 6 * number, np.uint8)).save(file)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained("model")
    done(CliRunner().invoke(init, ["image_classification"]))
    text = Path("image_classification.yaml").read_text()
    kept = [
        line
        for line in text.splitlines()
        if not line.startswith(("  full:", "  head:", "  lora:", "  flora-gradient:"))
    ]
    Path("image_classification.yaml").write_text("\n".join(kept))
    keys = [
        "task.model.name=./model",
        "task.data.size=32",
        "budget=1000",
        "training.max_steps=2",
        "training.batch_size=4",
    ]
    assert "| FLoRA" in done(flora("train", "image_classification.yaml", *keys, "training.mixed_precision=no"))
    adapter = "runs/image_classification/flora/trained"
    assert "FLoRA, " in done(flora("show", adapter))
    done(flora("merge", "model", adapter, "merged"))
    assert AutoModelForImageClassification.from_pretrained("merged", num_labels=2, ignore_mismatched_sizes=True)


def test_a_user_of_language_models_who_has_a_lora_config():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config = FloraConfig.like(lora, base)
    model, tokens = get_peft_model(base, config), torch.arange(8)[None]
    assert 0.9 * config.budget < model.get_nb_trainable_parameters()[0] <= config.budget == 2 * 2 * 4 * 32
    train(model, lambda: model(input_ids=tokens, labels=tokens).loss)
    model.save_pretrained("adapter")
    assert "vLLM" in done(flora("export", "lora", "adapter", "lora", "--verify", "base"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora")
    torch.testing.assert_close(plain(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_user_of_diffusion_models():
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained("unet")
    model = get_peft_model(unet, FloraConfig(budget=4000, target_modules=["to_q", "to_v", "conv1", "conv2"]))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 8)
    train(model, lambda: model(*inputs).sample.square().mean())
    model.save_pretrained("adapter")
    assert "ComfyUI" in done(flora("export", "locon", "adapter", "style.safetensors"))
    assert "load_lora_weights" in done(flora("export", "diffusers", "adapter", "style"))
    done(flora("export", "locon", "adapter", "lycoris.safetensors", "--prefix", "lycoris"))
    expected = model.eval()(*inputs).sample
    fresh = UNet2DConditionModel.from_pretrained("unet").eval()
    fresh.load_lora_adapter("style", prefix="unet", use_safetensors=True)
    torch.testing.assert_close(fresh(*inputs).sample, expected, rtol=1e-3, atol=1e-4)
    merged = UNet2DConditionModel.from_pretrained("unet").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network, _ = create_lycoris_from_weights(1.0, "lycoris.safetensors", merged)
        network.merge_to()
    torch.testing.assert_close(merged(*inputs).sample, expected, rtol=1e-3, atol=1e-4)
