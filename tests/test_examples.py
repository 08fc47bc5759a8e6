"""Every script in examples/ runs from beginning to end on tiny models, and its notebook runs like it."""

from __future__ import annotations

import copy
import json
import runpy
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

from flora import FloraConfig
from tiny_pipelines import stable_diffusion

EXAMPLES = Path(__file__).parents[1] / "examples"
TRANSFORMER = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def words(folder: str, **options: str) -> None:
    """A tokenizer with one token for each word that the examples use."""
    text = "a fine film well done I liked it dull badly left early The core is small, and the weight large."
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *dict.fromkeys(text.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", **options).save_pretrained(folder)


def language_model(folder: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    return model


def text_classifier() -> list[str]:
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained("model")
    words("model")
    return ["out", "--model", "model", "--budget", "0.3", "--steps", "2"]


def qlora() -> list[str]:
    language_model("model")
    words("model")
    return ["out", "--model", "model", "--steps", "2"]


def sft() -> list[str]:
    language_model("model")
    words("model", eos_token="[EOS]", chat_template="{% for one in messages %}{{ one['content'] }} {% endfor %}")
    return ["out", "--model", "model", "--budget", "0.5", "--steps", "2"]


def dreambooth() -> list[str]:
    stable_diffusion().save_pretrained("pipeline")
    Path("photos").mkdir()
    for number in range(2):
        Image.fromarray(np.full((24, 32, 3), 90 * number, np.uint8)).save(f"photos/{number}.png")
    return ["photos", "out", "--model", "pipeline", "--budget", "3000", "--steps", "2"]


def detection() -> list[str]:
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in TRANSFORMER.items()}
    none = dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone"), False)
    config = DetrConfig(backbone_config=backbone, d_model=16, num_queries=3, backbone=None, **sizes, **none)
    DetrForObjectDetection(config).save_pretrained("model")
    DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained("model")
    Path("pictures").mkdir()
    for number in range(2):
        Image.fromarray(np.full((30, 40, 3), 90 * number, np.uint8)).save(f"pictures/{number}.png")
    content = {
        "images": [{"id": 7 + n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [4, 5, 12, 9], "area": 108, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [20, 5, 10, 20], "area": 200, "iscrowd": 0},
        ],
    }
    Path("boxes.json").write_text(json.dumps(content))
    return ["pictures", "boxes.json", "out", "--model", "model", "--budget", "0.5", "--steps", "2"]


def image_folder() -> list[str]:
    for number in range(4):
        file = Path("photos", ("cat", "dog")[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 60 * number, np.uint8)).save(file)
    return ["photos", "out", "--model", "resnet10t", "--random", "--size", "32", "--steps", "1"]


def medical_3d() -> list[str]:
    return ["out", "--size", "16", "--steps", "2"]


def train() -> list[str]:
    return ["out"]


def extract() -> list[str]:
    base = language_model("base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("proj.weight"):
                parameter += 0.1 * torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1])
    tuned.save_pretrained("tuned")
    return ["base", "tuned", "out", "4000"]


def convert_locon() -> list[str]:
    from diffusers import UNet2DConditionModel
    from lycoris import LycorisNetwork, create_lycoris

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained("unet")
    before, LycorisNetwork.LORA_PREFIX = LycorisNetwork.LORA_PREFIX, "lora_unet"
    network = create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=2, conv_dim=2, conv_alpha=2, use_tucker=True)
    LycorisNetwork.LORA_PREFIX = before
    network.apply_to()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.save_weights("style.safetensors", None, {})
    return ["style.safetensors", "unet", "out"]


def mixed() -> list[str]:
    lora = get_peft_model(language_model("base"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained("lora")
    return ["base", "lora", "out/flora.safetensors"]


WRITES = {
    "text_classifier": (text_classifier, "adapter_model.safetensors"),
    "sft": (sft, "adapter_model.safetensors"),
    "qlora": (qlora, "adapter_model.safetensors"),
    "dreambooth": (dreambooth, "adapter/adapter_model.safetensors"),
    "detection": (detection, "adapter_model.safetensors"),
    "image_folder": (image_folder, "adapter_model.safetensors"),
    "medical_3d": (medical_3d, "adapter_model.safetensors"),
    "train": (train, "adapter_model.safetensors"),
    "extract": (extract, "lora/adapter_model.safetensors"),
    "convert_locon": (convert_locon, "comfyui.safetensors"),
    "mixed": (mixed, "flora.safetensors"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_script_runs_and_leaves_its_adapter(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    prepare, file = WRITES[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *prepare()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    tensors = load_file(Path("out", file))
    assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_server_answers_with_the_adapter_that_a_request_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, expected = language_model("base"), {}
    for name in ("english", "french"):
        torch.manual_seed(len(name))
        config = FloraConfig(r=4, scale=20.0, target_modules="all-linear", init_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(name)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name).eval()
        answer = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
        expected[name] = answer[0, 3:].tolist()
    serve = runpy.run_path(str(EXAMPLES / "serve.py"))
    client = TestClient(serve["application"]("base", {"english": "english", "french": "french"}))
    assert client.get("/adapters").json() == ["english", "french"] and expected["english"] != expected["french"]
    for name in ("french", "english", "french"):
        answer = client.post("/generate", json={"adapter": name, "tokens": [1, 2, 3]})
        assert answer.json() == {"tokens": expected[name]}
    missing = client.post("/generate", json={"adapter": "german", "tokens": [1]})
    assert missing.status_code == 404 and "english, french" in missing.json()["detail"]


def test_scripts_are_short_and_each_is_tested():
    scripts = {file.stem: file for file in EXAMPLES.glob("*.py")}
    assert set(scripts) == {*WRITES, "serve", "notebooks"}
    assert all(len(file.read_text().splitlines()) < 100 for file in scripts.values())


def test_a_notebook_runs_as_its_script_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "notebooks.py"))["main"]("made")
    assert {file.stem for file in Path("made").glob("*.ipynb")} == {*WRITES, "serve"}
    made = nbformat.read("made/extract.ipynb", as_version=4)
    nbformat.validate(made)
    about, *cells, last = made.cells
    assert about.source.startswith("# Extract\n\nTurn a full fine-tune into an adapter")
    assert last.source.splitlines()[2] == "sys.argv = ['examples/extract.py', 'BASE', 'TUNED', 'OUTPUT', '0.01']"
    names: dict = {}
    for cell in cells:
        exec(cell.source, names)
    arguments = extract()
    exec(
        last.source.replace("['examples/extract.py', 'BASE', 'TUNED', 'OUTPUT', '0.01']", repr(["", *arguments])), names
    )
    assert "weights" in capsys.readouterr().out and Path("out", "lora", "adapter_config.json").is_file()
