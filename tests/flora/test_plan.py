"""What would be adapted: targets, shorthands, patterns, budgets, heads, ties."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import flora
from flora import FloraConfig, plan
from flora.convert.adapter import Adapter
from reference import layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 7, groups=16), nn.Linear(16, 64), nn.Linear(64, 16)])
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 10)


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2))


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=16, d_model=8, **sizes, **heads))


def convnext():
    return ConvNextV2ForImageClassification(ConvNextV2Config(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2))


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def names(model, **options):
    return [row.name for row in plan(model, FloraConfig(**options)).rows]


def test_all_weights_is_every_supported_layer_but_the_head():
    assert names(Net(), target_modules="all-weights") == [
        "stem", "blocks.0", "blocks.1", "blocks.2", "attention.in_proj_weight", "attention.out_proj.weight",
    ]  # fmt: skip


def test_all_linear_takes_an_attention_s_projection_through_the_attention():
    assert names(Net(), target_modules="all-linear") == ["blocks.1", "blocks.2", "attention.out_proj.weight", "fc"]


def test_exclusions_hold_for_shorthands_too():
    rest = names(Net(), target_modules="all-weights", exclude_modules=["stem", "out_proj"], modules_to_save=["norm"])
    assert rest == ["blocks.0", "blocks.1", "blocks.2", "attention.in_proj_weight"]


def test_the_plan_is_what_gets_wrapped_and_touches_nothing():
    model = Net()
    before = str(model)
    made = plan(model, FloraConfig(budget=2000, target_modules="all-weights"))
    assert str(model) == before
    assert made.base_parameters == sum(p.numel() for p in model.parameters())
    wrapped = get_peft_model(model, FloraConfig(budget=2000, target_modules="all-weights"))
    trainable, _ = wrapped.get_nb_trainable_parameters()
    assert trainable == made.total <= 2000 < 1.02 * made.total
    again = plan(wrapped.base_model.model, FloraConfig(budget=2000, target_modules="all-weights"))
    assert [row.ranks for row in again.rows] == [row.ranks for row in made.rows]
    assert again.base_parameters == made.base_parameters
    table = str(made)
    assert "blocks.0" in table and "16×1×7×7" in table and f"{made.total:,} trainable" in table


def test_a_share_of_the_model():
    made = plan(Net(), FloraConfig(budget=0.2, target_modules="all-weights"))
    assert 0.98 * 0.2 <= made.share <= 0.2


def test_patterns_follow_peft_s_rule():
    config = FloraConfig(
        r=2,
        target_modules="all-weights",
        rank_pattern={"blocks.1": 5, "blocks.0": 6, r"blocks\.\d": [3, 1], "stem": [4, 2, 1, 1]},
        scale_pattern={"stem": 4.0},
    )
    rows = {row.name: row for row in plan(Net(), config).rows}
    assert rows["blocks.1"].ranks == (5, 5) and rows["blocks.0"].ranks == (6, 1, 4, 4)
    assert rows["blocks.2"].ranks == (3, 1) and rows["stem"].ranks == (4, 2, 1, 1)
    assert rows["stem"].scale == 4.0 and rows["blocks.2"].scale == "auto"


def test_a_pattern_keeps_its_ranks_under_a_budget():
    rows = plan(Net(), FloraConfig(budget=3000, target_modules="all-weights", rank_pattern={"stem": 1})).rows
    assert rows[0].ranks == (1, 1, 2, 2)


def test_seven_billion_parameters_in_seconds_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, num_hidden_layers=32))
    made = plan(model, FloraConfig(budget=0.005, target_modules="all-weights"))
    assert made.base_parameters > 6e9 and 0.98 * 0.005 <= made.share <= 0.005
    assert not any("lm_head" in row.name for row in made.rows)


def test_a_weight_that_two_modules_hold_is_left_out_by_the_shorthand_and_refused_twice():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    model.lm_head.weight = model.transformer.wte.weight
    assert "transformer.wte" not in names(model, target_modules="all-weights")
    assert names(model, target_modules=["wte"]) == ["transformer.wte"]
    with pytest.raises(ValueError, match=r"'transformer.wte' and 'lm_head' share one weight of shape \[20, 8\]"):
        plan(model, FloraConfig(target_modules=["wte", "lm_head"]))


@pytest.mark.parametrize("shorthand", ["all-weights", "all-linear"])
def test_a_shorthand_that_is_left_with_nothing_wraps_nothing(shorthand):
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    before = str(model)
    for use in (plan, get_peft_model):
        with pytest.raises(ValueError, match=f"no layer matches target_modules='{shorthand}'"):
            use(model, FloraConfig(target_modules=shorthand))
        assert str(model) == before


def test_a_backbone_and_stacked_experts():
    with torch.device("meta"):
        backbone = ConvNextV2ForImageClassification(ConvNextV2Config(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2))
        experts = AutoModelForCausalLM.from_config(
            MixtralConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=1,
                num_local_experts=4,
                vocab_size=16,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        )
    made = plan(backbone, FloraConfig(target_modules="all-weights"))
    assert {len(row.shape) for row in made.rows} == {2, 4} and not any("classifier" in row.name for row in made.rows)
    rows = plan(experts, FloraConfig(r=3, target_parameters=["experts.gate_up_proj", "experts.down_proj"])).rows
    assert [len(row.shape) for row in rows] == [3, 3] and all(row.shape[0] == 4 for row in rows)


def test_beside_lora_the_base_layer_counts():
    model = get_peft_model(Net(), LoraConfig(target_modules=["stem"])).base_model.model
    made = plan(model, FloraConfig(target_modules=["stem"]))
    assert (
        made.rows[0].shape == (16, 3, 3, 3)
        and made.base_parameters == plan(Net(), FloraConfig(target_modules=["stem"])).base_parameters
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["norm"]}, "layer 'norm' is a LayerNorm, which can't be adapted; supported: torch.nn"),
        ({"target_modules": ["absent"]}, "no layer matches target_modules"),
        ({"target_parameters": ["absent.weight"]}, r"target_parameters \['absent.weight'\] match no parameter"),
        ({"target_modules": ["stem"], "target_parameters": ["stem.weight"]}, "'stem' is targeted twice"),
        ({"target_modules": ["stem"], "r": [4, 4]}, r"layer 'stem': 2 ranks \[4, 4\] .* shape \[16, 3, 3, 3\]"),
        ({"target_modules": ["stem"], "rank_pattern": {"nothing": 3}}, r"rank_pattern: \['nothing'\] match none"),
        ({"target_modules": ["stem"], "scale_pattern": {"nothing": 3}}, r"scale_pattern: \['nothing'\] match none"),
        ({"target_modules": "all-weights", "budget": 100}, "a budget of 100 parameters is too small.*least possible"),
    ],
)  # fmt: skip
def test_refusals_name_layer_value_and_what_is_accepted(options, message):
    model = Net()
    before = str(model), {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        plan(model, FloraConfig(**options))
    with pytest.raises(ValueError):
        get_peft_model(model, FloraConfig(**options))
    assert (str(model), {name: id(p) for name, p in model.named_parameters()}) == before


def test_a_parameter_of_the_wrong_type_or_order():
    class Holder(nn.Module):
        def __init__(self, tensor) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.table = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())

    for tensor, message in [
        (torch.zeros(3, 3, dtype=torch.int8), "dtype torch.int8; a floating-point weight is needed"),
        (torch.zeros([2] * 7), "1 to 6 modes"),
        (torch.zeros(()), "1 to 6 modes"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan(Holder(tensor), FloraConfig(target_parameters=["inner.table"]))


def test_the_default_targets_of_a_model_that_peft_knows():
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=16,
        )
    )
    config = FloraConfig()
    made = plan(model, config)
    assert [row.name.rpartition(".")[2] for row in made.rows] == ["q_proj", "v_proj"] and config.target_modules is None
    get_peft_model(model, config)
    assert config.plan.rows == made.rows and config.target_modules == {"q_proj", "v_proj"}
    assert plan(model, FloraConfig()).rows == made.rows
    with pytest.raises(ValueError, match="no layer matches target_modules='all-weights'"):
        plan(nn.ModuleDict({"norm": nn.LayerNorm(4)}), FloraConfig())


class Labelled(Net):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config


@pytest.mark.parametrize(
    "make",
    [Net, lambda: Labelled({"model_type": "custom"}), lambda: Labelled({}), lambda: Labelled(None), convnext, resnet],
)
def test_the_default_targets_of_any_other_model_are_all_weights(make, tmp_path):
    model, options = make(), {"budget": 3000, "modules_to_save": ["fc" if isinstance(make(), Net) else "classifier"]}
    made = plan(model, FloraConfig(**options))
    assert made == plan(model, FloraConfig(**options, target_modules="all-weights"))
    model = get_peft_model(model, FloraConfig(**options, init_weights=False))
    assert model.peft_config["default"].plan.rows == made.rows
    assert plan(model.base_model.model, FloraConfig(**options)).rows == made.rows
    model.add_adapter("other", FloraConfig(**options))
    assert model.peft_config["other"].plan.rows == made.rows
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted({row.target for row in made.rows})
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(*(layers(one)[0].space("default").delta() for one in (loaded, model)))


def test_an_adapter_of_default_targets_is_refused_by_a_model_of_other_layers(tmp_path):
    get_peft_model(convnext(), FloraConfig(r=2)).save_pretrained(tmp_path)
    other = resnet()
    before = str(other)
    with pytest.raises(ValueError, match="another base model|has no such adapted weight|not found in the base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert str(other) == before


def test_layers_by_their_number_need_names_where_the_default_has_none():
    for use in (plan, get_peft_model):
        with pytest.raises(ValueError, match=r"layers_to_transform=\[0\] needs a list of names in target_modules"):
            use(Net(), FloraConfig(layers_to_transform=[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["stem", "block.1"]},
            "target_modules: no module of the model is called 'block.1'; did you mean 'blocks.1'?",
        ),
        ({"target_modules": ["stem", "0", "attentoin"]}, "'attentoin'; did you mean 'attention'?"),
        ({"target_modules": ["stem", "absent"]}, "no module of the model is called 'absent'$"),
        ({"target_modules": ["stem"], "modules_to_save": ["fcc"]}, "modules_to_save: .* 'fcc'; did you mean 'fc'?"),
        (
            {"target_modules": "all-weights", "exclude_modules": ["stem", "attentoin"]},
            "exclude_modules: .* 'attentoin'; did you",
        ),
    ],
)
def test_a_name_that_matches_nothing_beside_others_is_warned_of(options, message):
    for use in (plan, get_peft_model):
        with pytest.warns(UserWarning, match=message):
            use(Net(), FloraConfig(**options))


def test_what_a_shorthand_cannot_mean_is_left_out_and_named():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.stem)
    for use in (plan, get_peft_model):
        with pytest.warns(UserWarning, match="layer 'stem' is left out: 'weight' is not a parameter"):
            made = use(model, FloraConfig(target_modules="all-weights"))
        made = made if use is plan else made.peft_config["default"].plan
        assert "stem" not in [row.name for row in made.rows] and "left out: stem: 'weight' is not" in str(made)


@pytest.mark.parametrize(("make", "used"), [(t5, "q"), (bart, "q_proj")])
def test_a_weight_that_is_held_and_never_used_gets_no_budget(make, used):
    message = "shared'.* the model uses this weight under other names only"
    config = FloraConfig(target_modules=["shared", used], init_weights=False)
    with pytest.warns(UserWarning, match=message):
        made = plan(make(), config)
    assert not any("shared" in row.name for row in made.rows)
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(make(), config)
    assert not any("shared" in layer.name for layer in layers(model)) and layers(model)
    with pytest.raises(ValueError, match=message):
        plan(make(), FloraConfig(target_modules=["shared"]))
    assert names(make(), target_modules=["encoder.embed_tokens"])


class Alias(nn.Module):
    """One layer and one block, each under two names; what runs is the second."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.block = nn.Sequential(nn.Conv1d(4, 4, 1), nn.MultiheadAttention(6, 2))
        self.runner = nn.ModuleDict({"gate": self.gate, "block": self.block})

    def forward(self, x):
        return self.runner["block"][0](self.runner["gate"](x)[..., None])[..., 0]


@pytest.mark.parametrize("targets", ["all-weights", ["gate", "0"], ["runner.gate"]])
def test_a_layer_with_two_names_is_adapted_under_both(targets, tmp_path):
    torch.manual_seed(0)
    base, x = Alias(), torch.randn(3, 6)
    plain, config = base(x), FloraConfig(r=2, target_modules=targets, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    adapted = model(x)
    assert not torch.allclose(adapted, plain)
    inner = model.base_model.model
    assert inner.gate is inner.runner["gate"]
    model.add_adapter("other", config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(x), adapted)
    flora.hotswap(loaded, tmp_path)
    assert {site.name for site in Adapter.open(tmp_path).sites} == {row.name for row in config.plan.rows}
    assert not layers(loaded.unload()) and torch.equal(loaded.base_model.model(x), plain)
    merged = model.merge_and_unload()
    assert not layers(merged) and merged.gate is merged.runner["gate"]
    torch.testing.assert_close(merged(x), adapted)


def test_a_weight_that_is_computed_is_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer 'inner'.*'weight' is not a parameter of .*Linear .computed"):
        plan(nn.ModuleDict({"inner": layer}), FloraConfig(target_modules=["inner"]))


def test_a_layer_takes_further_adapters_of_the_same_weights_only():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.a, self.inner.b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))

    model = get_peft_model(Two(), FloraConfig(target_parameters=["inner.a", "inner.b"]))
    with pytest.raises(ValueError, match="already has adapters of .* must adapt the same weights"):
        model.add_adapter("other", FloraConfig(target_parameters=["inner.a"]))
    assert list(model.peft_config) == ["default"]
