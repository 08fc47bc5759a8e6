"""The adapter's files, against docs/format.md: read by the specification alone, for every version there ever was."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from flora import FloraConfig
from flora.layers.kinds import KINDS, RAW
from flora.layers.sites import Site
from flora.tuner.config import FORMAT_VERSION

GOLDEN = Path(__file__).with_name("golden")
VERSIONS = sorted(int(folder.name.removeprefix("version_")) for folder in GOLDEN.iterdir())


class Experts(nn.Module):
    """Two stacks, wrapped one around the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(2, 6, 3))
        self.down = nn.Parameter(torch.empty(2, 3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,eio,eoj->bsj", x, self.up, self.down)


class Base(nn.Module):
    """One weight of each nesting. Its numbers come from a formula: no generator has to stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 6)
        self.conv1d = Conv1D(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, groups=3, padding=2, dilation=2, padding_mode="circular")
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = Experts()
        self.head = nn.Linear(6, 4)
        for number, parameter in enumerate(self.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.data = 0.5 * torch.sin(steps + number)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.linear(self.words(tokens)) + self.conv1d(self.words(tokens))
        x = torch.tanh(self.conv(x.mT).mT)
        x = x + self.attention(x, x, x)[0]
        return self.head(x + self.experts(x))


TOKENS = torch.arange(10).reshape(2, 5) % 7
CONFIG = {
    "budget": 300, "target_modules": "all-weights", "target_parameters": ["experts.up", "experts.down"],
    "modules_to_save": ["head"], "scale_pattern": {"linear": 0.75},
}  # fmt: skip


SPECIFICATION = Path(__file__).parents[2].joinpath("docs", "format.md").read_text()


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the reader in docs/format.md: the updates by their weights' names, and the tensors that are saved whole."""
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", SPECIFICATION, re.DOTALL)[1], names)
    tensors = load_file(folder / "adapter_model.safetensors")
    whole = {key: tensor for key, tensor in tensors.items() if ".tucker_space." not in key}
    return dict(names["updates"](folder)), {key.removeprefix("base_model.model."): t for key, t in whole.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read_as_the_specification_says(version):
    folder = GOLDEN / f"version_{version}"
    updates, whole = read(folder)
    base = Base()
    weights = {name: parameter + updates.pop(name, 0) for name, parameter in base.named_parameters()} | whole
    assert not updates and whole.keys() == {"head.weight", "head.bias"}
    expected = functional_call(base, weights, (TOKENS,))
    assert (expected - base(TOKENS)).abs().max() > 0.1
    model = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.merge_and_unload()(TOKENS), expected, rtol=1e-12, atol=1e-12)


def test_every_version_has_a_golden_file():
    assert VERSIONS == list(range(1, FORMAT_VERSION + 1))


def test_todays_files_are_those_of_the_newest_version(tmp_path):
    """A change of the format needs a new version and a new golden file."""
    golden = GOLDEN / f"version_{FORMAT_VERSION}"
    get_peft_model(Base(), FloraConfig(**CONFIG)).save_pretrained(tmp_path)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (golden, tmp_path))
    facts = {key: (tensor.shape, tensor.dtype) for key, tensor in old.items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in new.items()} == facts
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (golden, tmp_path))
    assert new["weights"] == old["weights"] and new["ranks"] == old["ranks"]
    assert old.keys() - {"peft_version"} <= new.keys()


def test_the_specification_names_every_key_of_a_site_and_every_kind():
    named = set(re.findall(r"`(\w+)`", SPECIFICATION))
    assert {*(field.name for field in fields(Site)), *(kind.name for kind in (*KINDS, RAW))} <= named


# ----------------------------------------------------------------------------------------------------------------- card


@pytest.fixture
def classifier(tmp_path):
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    config = FloraConfig(budget=700, target_modules="all-weights", task_type="SEQ_CLS", init_weights=False)
    return get_peft_model(base, config).eval()


def test_the_card_s_lines_load_the_adapter(classifier, tmp_path, monkeypatch):
    classifier.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    plan = classifier.peft_config["default"].plan
    for fact in (str(tmp_path / "base"), "budget=700", f"{plan.total:,} parameters in 10 weights", "`classifier`"):
        assert fact in card
    assert "More Information Needed" not in card and "flora export lora . OUT" in card
    monkeypatch.chdir(tmp_path / "adapter")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(names["model"].eval()(tokens).logits, classifier(tokens).logits)


def test_a_card_follows_the_adapter_and_keeps_what_the_user_wrote(classifier, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\ndatasets:\n- glue\nlicense: mit\n---\n# Mine\n\nHow I made it.\n")
    for adapter, size in (("default", "budget=700"), ("second", "r=1")):
        if adapter == "second":
            classifier.add_adapter("second", FloraConfig(r=1, target_modules=["query"], task_type="SEQ_CLS"))
        classifier.save_pretrained(tmp_path, selected_adapters=[adapter])
        text = card.read_text()
        assert "How I made it." in text and text.count("import flora\n") == 1 and "trained on | glue" in text
        assert size in text
    assert "budget=700" not in text and ModelCard.load(card).data.license == "mit"
    os.remove(card)
    classifier.save_pretrained(tmp_path)
    assert "`default`" in card.read_text() and "`second`" in card.read_text()
