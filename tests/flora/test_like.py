"""FloraConfig.like: the targets and the budget of another method's config."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flora
from cases import Experts
from flora import FloraConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 24)
        self.conv = nn.Conv2d(8, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.blocks = nn.ModuleList([nn.Linear(24, 48), nn.Linear(48, 24)])
        self.attention = nn.MultiheadAttention(24, 2)
        self.experts = Experts(4, 24, 16)
        self.head = nn.Linear(24, 3)


OTHERS = [
    LoraConfig(r=4, target_modules=["0", "1"]),
    LoraConfig(r=4, target_modules=r"blocks\.\d"),
    LoraConfig(r=3, target_modules=["words", "conv", "0"], use_dora=True),
    LoraConfig(r=4, target_modules=["0", "1", "conv"], rank_pattern={"0": 8, "conv": 2}),
    LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa", lora_dropout=0.1, modules_to_save=["head"]),
    LoraConfig(r=4, target_modules=["attention"], use_rslora=True),
    LoraConfig(r=2, target_modules=["0"], target_parameters=["experts.up"]),
    LoHaConfig(r=4, target_modules=["0", "conv"], use_effective_conv2d=True),
    LoKrConfig(r=4, decompose_factor=2, target_modules=["0", "1"]),
    OFTConfig(r=0, oft_block_size=8, target_modules=["0", "1"]),
    AdaLoraConfig(target_r=3, init_r=6, total_step=10, target_modules=["0", "1"]),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: f"{OTHERS.index(other)}-{type(other).__name__}")
def test_the_budget_is_the_other_method_s_count_on_the_model(other):
    net = Net()
    before, numbers = str(net), copy.deepcopy(net.state_dict())
    config = FloraConfig.like(other, net)
    assert str(net) == before and all(torch.equal(net.state_dict()[key], numbers[key]) for key in numbers)
    made = flora.plan(net, config)
    other = copy.deepcopy(other)
    if isinstance(other, AdaLoraConfig):
        other.init_r = other.target_r
    model = peft.get_peft_model(Net(), other)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    adapted = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name, _ in layers}
    assert {row.module for row in made.rows} == {name.removesuffix(".out_proj") for name in adapted}
    head = sum(parameter.numel() for parameter in net.head.parameters()) if config.modules_to_save else 0
    count = model.get_nb_trainable_parameters()[0] - head
    assert config.budget == count and 0.85 * count < made.total <= count


def test_a_layer_with_a_rank_of_its_own_has_its_own_share():
    counts = {"blocks.0": 8 * (24 + 48), "conv": 2 * (8 * 9 + 24)}
    config = FloraConfig.like(OTHERS[3], Net())
    rows = {row.module: row for row in flora.plan(Net(), config).rows}
    for module, count in counts.items():
        assert 0.85 * count < rows[module].parameters <= count


def test_what_carries_over_and_what_changes():
    lora = LoraConfig(
        r=4, lora_alpha=64, lora_dropout=0.2, bias="lora_only", target_modules=["q_proj"], exclude_modules=["0"],
        layers_to_transform=[1], layers_pattern="layers", task_type="CAUSAL_LM", modules_to_save=["norm"],
        rank_pattern={"q_proj": 2},
    )  # fmt: skip
    config = FloraConfig.like(lora, init="activations")
    assert config.r == 4 and config.budget is None and config.rank_pattern == {"q_proj": 2} and config.scale == "auto"
    assert config.dropout == 0.2 and config.bias == "flora_only" and config.init == "activations"
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"):
        assert getattr(config, field) == getattr(lora, field)
    config.target_modules.add("v_proj")
    assert lora.target_modules == {"q_proj"} and lora.modules_to_save == ["norm"]
    assert FloraConfig.like(lora, budget=100).budget == 100


def test_pefts_own_choice_of_targets():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    config = FloraConfig.like(LoraConfig(r=2), llama)
    assert config.target_modules == {"q_proj", "v_proj"} and config.budget == 2 * 2 * 32
    everything = FloraConfig.like(LoraConfig(r=2, target_modules="all-linear"), llama)
    assert len(flora.plan(llama, everything).rows) == 7


def test_what_has_no_counterpart():
    net = Net()
    with pytest.raises(ValueError, match="PromptTuningConfig .PROMPT_TUNING. adapts no layers"):
        FloraConfig.like(PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="IA3Config has no rank: give the model, or r= or budget="):
        FloraConfig.like(IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="layer_replication makes another model"):
        FloraConfig.like(LoraConfig(target_modules=["0"], layer_replication=[[0, 2]]), net)
    adapted = peft.get_peft_model(net, LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="has adapters already; give the base model"):
        FloraConfig.like(LoraConfig(target_modules=["0"]), adapted)
