"""`flora show` against dense updates in float64, and the pages that `show` and `plan` draw."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from lycoris import create_lycoris
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from cases import CASES
from commands import assert_refused, flora
from flora import FloraConfig
from flora.convert import show


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, tokens):
        return self.fc(self.conv(self.words(tokens).mT[..., None]).mean((2, 3)))


def dense(weight, delta) -> None:
    """The row's norm and spectrum are those of the dense update."""
    spectrum = torch.linalg.svdvals(delta.detach().double().reshape(len(delta), -1))
    assert weight.shape == tuple(delta.shape)
    assert weight.norm == pytest.approx(delta.double().norm().item(), rel=1e-5)
    own = torch.tensor(weight.spectrum, dtype=torch.float64)
    torch.testing.assert_close(own, spectrum[: len(own)], rtol=1e-4, atol=1e-5)
    assert (spectrum[len(own) :] < 1e-4).all()
    kept = spectrum.square().cumsum(0) / spectrum.square().sum()
    assert weight.rank_in_use == int((kept < 0.99).sum()) + 1


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id.startswith(("Linear", "Conv", "para"))], ids=lambda c: c.id
)
def test_norm_and_spectrum_of_every_case(case, tmp_path):
    model = nn.ModuleDict({"layer": case.make()}).double()
    parameters = {"target_parameters": list(case.parameters)} if case.parameters else {"target_modules": ["layer"]}
    adapted = get_peft_model(model, FloraConfig(**{"r": 3, "init_weights": False, **case.config, **parameters}))
    adapted.save_pretrained(tmp_path)
    spaces = [module.tucker_space["default"] for module in adapted.modules() if hasattr(module, "tucker_space")]
    (weight,) = show(tmp_path).weights
    dense(weight, spaces[0].delta())


def test_a_lora_is_shown_like_the_same_flora(tmp_path):
    lora = get_peft_model(Net(), LoraConfig(r=3, target_modules=["conv", "fc", "words"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    shown = show(tmp_path)
    assert shown.form == "LoRA" and {one.name for one in shown.weights} == {"conv", "fc", "words"}
    for one in shown.weights:
        dense(one, lora.base_model.model.get_submodule(one.name).get_delta_weight("default"))
    assert sum(map(shown.share, shown.weights)) == pytest.approx(1) and shown.weights == sorted(
        shown.weights, key=lambda one: -one.norm
    )


@pytest.mark.parametrize("tucker", [True, False])
def test_a_locon_file(tucker, tmp_path):
    net = Net()
    network = create_lycoris(net, 1.0, linear_dim=3, linear_alpha=1, conv_dim=2, conv_alpha=1, use_tucker=tucker)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network.save_weights(str(tmp_path / "file.safetensors"), None, {})
    shown = show(tmp_path / "file.safetensors")
    assert shown.form == "LoCon" and {one.kind for one in shown.weights} == (
        {"Tucker", "product"} if tucker else {"product"}
    )
    for layer in network.loras:
        (one,) = [one for one in shown.weights if one.name == layer.lora_name]
        dense(one, layer.get_diff_weight(1.0)[0])


def test_the_table_says_which_layers_matter(tmp_path):
    model = get_peft_model(Net(), FloraConfig(r=2, target_modules=["conv", "fc"], init_weights=False))
    with torch.no_grad():
        model.base_model.model.conv.tucker_space["default"].core.mul_(100)
    model.save_pretrained(tmp_path / "adapter")
    result = flora("show", tmp_path / "adapter", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2].startswith("conv ") and "8×6×3×3" in lines[2] and "█" in lines[2]
    assert "1 of them have half of its square" in result.output and str(tmp_path / "page.html") in lines[-1]
    fresh = get_peft_model(Net(), FloraConfig(r=2, target_modules=["fc"]))
    fresh.save_pretrained(tmp_path / "fresh")
    assert "all updates are zero" in flora("show", tmp_path / "fresh", "--all").output


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; 'FLORA' or 'LORA' is needed"),
        ("x", "not a whole JSON"),
    ],
)
def test_what_cannot_be_shown_is_one_line(content, named, tmp_path):
    if content is not None:
        (tmp_path / "adapter").mkdir()
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    assert_refused(flora("show", tmp_path / "adapter"), named)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_of_a_plan(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(**sizes, vocab_size=40, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "<b>llama")
    page = tmp_path / "plan.html"
    result = flora("plan", tmp_path / "<b>llama", "budget=0.2", "target_modules=all-weights", "--html", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    tags = Tags(text)
    assert (
        not tags.open and "model.layers.1.mlp.down_proj" in tags.words and not re.search(r"https?:|src=|<b>llama", text)
    )
    shares = [float(share) for share in re.findall(r"([\d.]+)%<b ", text)]
    assert len(shares) == 15 and sum(shares) == pytest.approx(100, abs=0.2)
    assert_refused(flora("plan", tmp_path / "<b>llama", "--html", page), "exists already")


def test_a_file_that_is_no_adapter_is_refused(tmp_path):
    Path(tmp_path, "x.safetensors").write_text("no")
    assert_refused(flora("show", tmp_path / "x.safetensors"), "not a whole safetensors file")
