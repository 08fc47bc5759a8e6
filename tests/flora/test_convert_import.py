"""Imports of LoRA: exact against PEFT, or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from test_convert import CLOSE, edit
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora.convert import export_lora, import_lora, merge
from flora.files import WEIGHTS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fan_in_fan_out:UserWarning",
    "ignore:Using Rank-Stabilized LoRA:UserWarning",
    "ignore:The following .*_pattern keys did not match:RuntimeWarning",  # PEFT looks at modules only, and applies them
)


class Experts(nn.Module):
    """Stacks of square matrices, two to a module, whose order and orientation no shape tells."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up, self.down = (nn.Parameter(torch.randn(3, 6, 6)) for _ in range(2))

    def forward(self, x):
        for stack in (self.up, self.down):
            x = torch.tanh(torch.einsum("bi,eio->bo" if self.is_transposed else "bi,eoi->bo", x, stack))
        return x


class Net(nn.Module):
    """Square layers of every kind that a LoRA may have."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.table, self.linear, self.turned = nn.Embedding(9, 6), nn.Linear(6, 6), Conv1D(6, 6)
        self.conv, self.ring = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.experts = Experts(is_transposed)
        self.norm = nn.Parameter(torch.randn(6, 6))

    def forward(self, ids):
        x = self.table(ids)
        x = torch.tanh(self.linear(x)) + torch.tanh(self.turned(x)) + x @ self.norm
        x = torch.tanh(self.conv(x.mT)).mT + self.ring(x.mT).mT
        return self.experts(x.flatten(0, 1))


IDS = torch.arange(8).view(2, 4)


def lora_of(folder: Path, dtype=torch.float64, is_transposed: bool = False, **options):
    """(the base, the LoRA's outputs), and the LoRA in the folder, trained a little."""
    torch.manual_seed(0)
    base = Net(is_transposed).to(dtype)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **{"init_lora_weights": False, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(folder))
        return base, model.eval()(IDS)


@pytest.mark.filterwarnings("ignore")
def test_eva_which_moves_ranks_between_layers(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    eva = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(copy.deepcopy(base), eva)
    x = torch.randn(32, 1) + 0.01 * torch.randn(32, 8)  # in one direction, so the first layer needs one rank only
    batches = [{"input": part} for part in x.split(8)]
    as_they_are = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    initialize_lora_eva_weights(model, batches, forward_fn=lambda model, batch: model(batch["input"]), **as_they_are)
    assert torch.equal(model(x), base(x)) and model.peft_config["default"].rank_pattern
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "lora")
        import_lora(tmp_path / "lora", tmp_path / "flora")
        ours = PeftModel.from_pretrained(base, tmp_path / "flora")
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)


def outputs(base, folder: Path):
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(IDS)


EXACT = {
    "embedding": {"target_modules": ["table"]},
    "mixed": {"target_modules": ["linear", "turned"]},
    "mixed-backwards": {"target_modules": ["turned", "linear", "conv", "table"]},
    "rslora": {"target_modules": ["linear", "conv"], "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["linear", "conv", "turned"],
        "rank_pattern": {"^linear": 3, "con.": 1},
        "alpha_pattern": {"turned": 5, "linear": 7},
    },
    "stacks": {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
    "stacks-backwards": {"target_modules": [], "target_parameters": ["experts.down", "experts.up"]},
    "stacks-transposed": {
        "target_modules": [], "target_parameters": ["experts.down", "experts.up"], "is_transposed": True
    },
    "stack-patterns": {
        "target_modules": [], "target_parameters": ["experts.up", "experts.down"],
        "rank_pattern": {"experts.up": 1}, "alpha_pattern": {"down": 5},
    },
    "gaussian": {"target_modules": ["linear"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["linear"], "init_lora_weights": "orthogonal"},
    "saved-head": {"target_modules": ["linear"], "modules_to_save": ["conv"], "bias": "lora_only"},
}  # fmt: skip


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_with_its_base_model_every_lora_is_exact(options, tmp_path):
    base, expected = lora_of(tmp_path / "lora", **options)
    import_lora(tmp_path / "lora", tmp_path / "flora", base=base)
    torch.testing.assert_close(outputs(base, tmp_path / "flora"), expected, **CLOSE)
    export_lora(tmp_path / "flora", tmp_path / "again", ragged=True)
    torch.testing.assert_close(outputs(base, tmp_path / "again"), expected, **CLOSE)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3, "alpha_pattern": {"^linear": 1}}])
def test_starts_that_change_the_base_weight_are_exact(start, options, tmp_path):
    # PEFT makes these starts in float32 at most
    base, expected = lora_of(
        tmp_path / "lora", torch.float32, target_modules=["linear"], init_lora_weights=start, **options
    )
    state = torch.get_rng_state()
    import_lora(tmp_path / "lora", tmp_path / "flora", base=base)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(outputs(base, tmp_path / "flora"), expected, rtol=1e-5, atol=1e-5)
    assert (base(IDS) - expected).abs().max() > 1e-2


def test_pissa_of_a_transposed_layer_is_exact(tmp_path):
    base, expected = lora_of(
        tmp_path / "lora", torch.float32, target_modules=["turned"], init_lora_weights="pissa", fan_in_fan_out=True
    )
    import_lora(tmp_path / "lora", tmp_path / "flora", base=base)
    torch.testing.assert_close(outputs(base, tmp_path / "flora"), expected, rtol=1e-5, atol=1e-5)


REFUSED = {
    **{
        f"{name}={value}": ({name: value}, name)
        for name, value in {
            "use_dora": True, "lora_bias": True, "layer_replication": [[0, 2], [1, 3]], "use_qalora": True,
            "alora_invocation_tokens": [1], "kasa_config": {"beta": 1}, "arrow_config": {"top_k": 2},
            "use_bdlora": {"nblocks": 2}, "monteclora_config": {"num_samples": 8}, "ensure_weight_tying": True,
            "use_of_next_year": True,
        }.items()
    },
    **{
        f"init={start}": ({"init_lora_weights": start}, f"init_lora_weights='{start}'")
        for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "start_of_next_year")
    },
}  # fmt: skip


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("fields, named", REFUSED.values(), ids=REFUSED)
def test_what_is_more_than_an_update_is_refused_by_name(fields, named, with_base, tmp_path):
    base, _ = lora_of(tmp_path / "lora", target_modules=["linear"])
    edit(tmp_path / "lora", **fields)
    with pytest.raises(ValueError, match=named):
        import_lora(tmp_path / "lora", tmp_path / "flora", base=base if with_base else None)
    assert not (tmp_path / "flora").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_weight_ask_for_it(start, tmp_path):
    lora_of(tmp_path / "lora", torch.float32, target_modules=["linear"], init_lora_weights=start)
    with pytest.raises(ValueError, match=f"{start}.*give BASE"):
        import_lora(tmp_path / "lora", tmp_path / "flora")


def test_a_lora_that_its_base_runs_otherwise_is_refused(tmp_path):
    base, _ = lora_of(tmp_path / "lora", target_modules=["ring"])
    with pytest.raises(ValueError, match="circular.*'ring'"):
        import_lora(tmp_path / "lora", tmp_path / "flora", base=base)


# without its base model an import may take the modes of a square weight in the wrong order
GUESSES = {
    "mixed": {"target_modules": ["linear", "turned"]},
    "stacks-backwards": {"target_modules": [], "target_parameters": ["experts.down", "experts.up"]},
    "stacks-transposed": {
        "target_modules": [], "target_parameters": ["experts.up", "experts.down"], "is_transposed": True
    },
}  # fmt: skip


@pytest.mark.parametrize("options", GUESSES.values(), ids=GUESSES)
def test_a_wrong_guess_is_right_or_refused_when_it_meets_its_model(options, tmp_path):
    base, expected = lora_of(tmp_path / "lora", **options)
    edit(tmp_path / "lora", fan_in_fan_out=False)
    try:
        assert "give BASE" in import_lora(tmp_path / "lora", tmp_path / "flora")
        found = outputs(base, tmp_path / "flora")
    except ValueError as error:
        assert "base=" in str(error) or "does not tell" in str(error)
    else:
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_wrong_guess_is_not_merged(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8, "tie_word_embeddings": False}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["attn.c_proj", "lm_head"], init_lora_weights=False)
    lora = get_peft_model(model, config)
    lora.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    import_lora(tmp_path / "lora", tmp_path / "guess")
    with pytest.raises(ValueError, match=r"c_proj'.*Linear \(out × in\).*Conv1D \(in × out\)"):
        merge(tmp_path / "base", tmp_path / "guess", tmp_path / "merged")
    import_lora(tmp_path / "lora", tmp_path / "flora", base=tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "flora", tmp_path / "merged")
    merged, ids = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval(), torch.arange(8)[None]
    torch.testing.assert_close(merged(ids).logits, lora.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_pissa_of_a_model_on_disk(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=24, pad_token_id=0), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights="pissa")
    lora, ids = get_peft_model(copy.deepcopy(model), config).eval(), torch.arange(8)[None]
    for parameter in lora.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    lora.save_pretrained(str(tmp_path / "lora"))
    import_lora(tmp_path / "lora", tmp_path / "flora", base=str(tmp_path / "base"))
    found = PeftModel.from_pretrained(model, str(tmp_path / "flora")).eval()(ids).last_hidden_state
    torch.testing.assert_close(found, lora(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "flora" / WEIGHTS).is_file()
