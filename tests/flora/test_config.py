"""Bad input to the config and bad files: one clear error, and nothing half done."""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import flora
from flora import FloraConfig
from flora.tuner.config import FORMAT_VERSION
from reference import layers

WEIGHTS = "adapter_model.safetensors"


def net(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 4, 5))


X = torch.ones(2, 3, 4, 4)


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["0", "2"], init_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number from 1, or a list of one per mode, got 0"),
        ({"r": -3}, "got -3"),
        ({"r": 2.5}, "got 2.5"),
        ({"r": True}, "got True"),
        ({"r": [4, 0]}, r"got \[4, 0\]"),
        ({"r": []}, r"got \[\]"),
        ({"r": "8"}, "got '8'"),
        ({"kernel_rank": 0}, "kernel_rank must be a whole number from 1, got 0"),
        ({"budget": 0}, r"budget must be a number of parameters .* or a share .* got 0"),
        ({"budget": -5}, "got -5"),
        ({"budget": 1.5}, "got 1.5"),
        ({"budget": 0.0}, "got 0.0"),
        ({"budget": float("nan")}, "got nan"),
        ({"r": 4, "budget": 100}, "r=4 and budget=100: give one of them"),
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\] must be .* got 0"),
        ({"scale": "big"}, "scale must be 'auto' or a finite number other than 0, got 'big'"),
        ({"scale": 0}, "got 0"),
        ({"scale": float("inf")}, "got inf"),
        ({"scale_pattern": {"a": "x"}}, r"scale_pattern\['a'\]"),
        (
            {"scales": {"a": "auto"}},
            "scales must be None or a dictionary of weights' names to numbers, got {'a': 'auto'}",
        ),
        (
            {"init": "zeros"},
            "must be one of core, factor, activations, gradient, official, official-normal, got 'zeros'",
        ),
        ({"init_weights": "core"}, "init_weights must be true or false"),
        ({"execution": "fast"}, "execution must be one of auto, factored, merged, got 'fast'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"bias": "lora_only"}, "bias must be one of none, all, flora_only"),
        ({"target_modules": "all-weights", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
        ({"target_modules": "("}, r"target_modules must be a list of names or a regex, got '\(': .* at position 0"),
        ({"target_modules": "conv[0"}, r"got 'conv\[0': .* at position 4"),
        ({"target_modules": 3}, "target_modules must be a list of names or a regex, got 3$"),
        ({"target_modules": ["conv", 3]}, r"target_modules must be a list of names or a regex, got \['conv', 3\]$"),
        ({"target_modules": [["conv"]]}, r"got \[\['conv'\]\]"),
        ({"exclude_modules": "*"}, r"exclude_modules must be .* got '\*': nothing to repeat at position 0"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules must be a list of names or a regex, got {'a': 1}"),
        ({"target_parameters": "a.weight"}, "target_parameters must be a list of names, got 'a.weight'"),
        ({"rank_pattern": {"a)": 2}}, r"rank_pattern must have names or regexes as keys, got 'a\)': .* position 1"),
        ({"rank_pattern": [2]}, r"rank_pattern must have names or regexes as keys, got \[2\]$"),
        ({"scale_pattern": {3: 2.0}}, "scale_pattern must have names or regexes as keys, got 3$"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        FloraConfig(**options)


def test_registered_as_a_real_peft_type():
    assert PeftType("FLORA") is PeftType.FLORA and PeftType.FLORA.value == "FLORA"
    assert FloraConfig().peft_type is PeftType.FLORA and PeftType.FLORA in list(PeftType)


def test_config_round_trip(tmp_path):
    config = FloraConfig(
        budget=0.01, kernel_rank=1, target_modules=["b", "a"], target_parameters=["c.d"], rank_pattern={"a": [1, 2]},
        scale=4.0, scale_pattern={"b": "auto"}, init="official", dropout=0.1, execution="merged", bias="all",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter_config.json"]


def test_a_budget_loads_with_the_ranks_it_came_to(tmp_path):
    config = FloraConfig(budget=200, target_modules=["0", "2"])
    model = get_peft_model(net(), config)
    assert config.ranks is None and config.target_modules == {"0", "2"}  # the user's own stays as it was
    model.save_pretrained(tmp_path)
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["ranks"]
    assert ranks == {layer.name: list(layer.tucker_space["default"].ranks) for layer in layers(model)}
    PeftModel.from_pretrained(net(), tmp_path)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def newer(folder):
    change_config(folder, format_version=FORMAT_VERSION + 1)


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def garbage(folder):
    (folder / WEIGHTS).write_bytes(b"not a safetensors file")


def foreign(folder):
    save_file({"base_model.model.0.lora_A.weight": torch.ones(2, 3)}, folder / WEIGHTS)


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def missing(folder):
    change_weights(folder, lambda tensors: tensors.pop("base_model.model.2.tucker_space.core"))


def additional(folder):
    change_weights(folder, lambda t: t.update({"base_model.model.7.tucker_space.core": torch.ones(2, 2)}))


def whole_numbers(folder):
    key = "base_model.model.2.tucker_space.core"
    change_weights(folder, lambda tensors: tensors.update({key: tensors[key].to(torch.int32)}))


def not_finite(folder):
    change_weights(folder, lambda t: t["base_model.model.2.tucker_space.core"].fill_(torch.inf))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (newer, "format 2, this flora reads up to 1; upgrade"),
        (truncated, "not a whole safetensors file"),
        (garbage, "not a whole safetensors file"),
        (foreign, "holds no FLoRA weights .*lora_A"),
        (missing, r"layer '2': the adapter's file has nothing for core.*shape \[5, 24\]"),
        (additional, "unexpected key '7.tucker_space.core' .* this base model has no such adapted weight"),
        (whole_numbers, "dtype I32; a floating-point one is needed"),
    ],
)
def test_a_spoilt_adapter_is_refused_and_the_model_left_alone(saved, spoil, message):
    spoil(saved)
    model = net()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, saved)
    assert str(model) == before and not hasattr(model, "peft_config")

    host = get_peft_model(net(), FloraConfig(r=2, target_modules=["0"]))
    before = str(host)
    with pytest.raises(ValueError, match=message):
        host.load_adapter(saved, "other")
    assert str(host) == before and list(host.peft_config) == ["default"]


def test_the_file_decides_the_ranks(saved):
    change_config(saved, r=3, ranks=None)
    model = PeftModel.from_pretrained(net(), saved)
    assert {layer.tucker_space["default"].ranks for layer in layers(model)} == {(2, 2, 2, 2), (2, 2)}


def test_another_base_model_is_told_by_layer_and_shape(saved):
    model = net(width=8)
    with pytest.raises(ValueError, match=r"layer '0': .*factor_0.*shape \[8, 3, 3, 3\].*another base model"):
        PeftModel.from_pretrained(model, saved)
    assert not layers(model)


# how an update comes to be not finite; in the last, all its numbers are
BROKEN = {
    "core": lambda layer, space: space.core.data[0, 0].fill_(torch.nan),
    "factor": lambda layer, space: space.factor_1.data[0, 0].fill_(torch.inf),
    "scale": lambda layer, space: space.scale.fill_(torch.nan),
    "run-time scale": lambda layer, space: layer.set_scale("default", torch.inf),
    "overflow": lambda layer, space: [tensor.data.fill_(1e30) for tensor in (space.core, *space.factors)],
}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_is_never_merged_in_part(spoil, safe):
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["0", "2"], init_weights=False))
    with torch.no_grad():
        spoil(layers(model)[1], layers(model)[1].tucker_space["default"])
    before = [layer.base_parameter.clone() for layer in layers(model)]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected.*layer .2., shape"):
            merge(safe_merge=safe)
        assert all(torch.equal(a.base_parameter, b) for a, b in zip(layers(model), before, strict=True))
        assert not any(layer.merged for layer in layers(model))


def test_a_scaled_core_beyond_its_own_type_is_merged():
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["2"], init_weights=False)).half()
    layer = layers(model)[0]
    with torch.no_grad():
        for parameter, number in zip(layer.space("default").parameters(), (1.0, 2**-10, 2**-10), strict=True):
            parameter.fill_(number)
    layer.space("default").set_scale(2.0**20)
    expected = layer.base_parameter + 4.0  # of 2 x 2 ranks
    assert torch.equal(model.merge_and_unload(safe_merge=True)[2].weight, expected)


def test_a_merge_that_overflows_the_dtype_is_refused_when_safe():
    model = get_peft_model(net().half(), FloraConfig(r=2, target_modules=["2"], init_weights=False))
    layers(model)[0].set_scale("default", 1e9)
    with pytest.raises(ValueError, match="layer '2', .*torch.float16 can't hold the sum"):
        model.merge_adapter(safe_merge=True)
    assert not layers(model)[0].merged


def test_hotswap_replaces_numbers_in_place_and_refuses_the_rest(saved, tmp_path_factory):
    model = get_peft_model(net(), FloraConfig(r=3, target_modules=["0", "2"], init_weights=False)).eval()
    parameters = [p.data_ptr() for layer in layers(model) for p in layer.tucker_space["default"].parameters()]
    flora.hotswap(model, saved, "default")  # from rank 2 into rank 3
    assert parameters == [p.data_ptr() for layer in layers(model) for p in layer.tucker_space["default"].parameters()]
    torch.testing.assert_close(model(X), PeftModel.from_pretrained(net(), saved).eval()(X))

    larger = tmp_path_factory.mktemp("larger")
    get_peft_model(net(), FloraConfig(r=4, target_modules=["0", "2"])).save_pretrained(larger)
    fewer = tmp_path_factory.mktemp("fewer")
    get_peft_model(net(), FloraConfig(r=2, target_modules=["0"])).save_pretrained(fewer)
    broken = {}
    for spoil in (truncated, whole_numbers, not_finite):
        broken[spoil] = tmp_path_factory.mktemp(spoil.__name__)
        shutil.copytree(saved, broken[spoil], dirs_exist_ok=True)
        spoil(broken[spoil])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for folder, message in [
        (larger, r"shape \[4.* does not fit"),
        (fewer, "other layers"),
        (broken[truncated], "not a whole safetensors file"),
        (broken[whole_numbers], "dtype I32"),
        (broken[not_finite], "numbers in .* are not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            flora.hotswap(model, folder, "default")
    with pytest.raises(ValueError, match="no FLoRA adapter 'absent'"):
        flora.hotswap(model, saved, "absent")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def loaded(folder):
    """An adapter whose scale is neither its config's nor what "auto" comes to here."""
    get_peft_model(net(), FloraConfig(r=2, target_modules=["0", "2"], init_weights=False, scale=3.0)).save_pretrained(
        folder
    )
    change_config(folder, scale="auto", scales=None)
    return PeftModel.from_pretrained(net(), folder)


def loaded_into(folder):
    loaded(folder)
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["0", "2"]))
    model.load_adapter(folder, "default")
    return model


def swapped_in(folder):
    loaded(folder)
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["0", "2"]))
    flora.hotswap(model, folder)
    return model


def summed(folder):
    model = loaded(folder)
    model.add_adapter("other", FloraConfig(r=3, target_modules=["0", "2"], init_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    model.save_pretrained(folder, selected_adapters=["sum"])
    return PeftModel.from_pretrained(net(), folder / "sum")


def merged(folder):
    model = loaded(folder)
    model.merge_adapter()
    return model


def copied_numbers(source: nn.Module, target: nn.Module, name: str) -> None:
    """As TRL does it: parameters, and nothing else, by their names."""
    numbers = dict(source.named_parameters())
    for key, p in target.named_parameters():
        if f".{name}." in key:
            p.data.copy_(numbers[key.replace(f".{name}.", ".default.")])


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
@pytest.mark.parametrize("make", [loaded, loaded_into, swapped_in, summed, merged])
def test_config_and_parameters_are_the_whole_adapter(make, tmp_path):
    model = make(tmp_path).eval()
    expected = model(X)
    for name, config in [("same", model.peft_config["default"]), ("copy", copy.deepcopy(model.peft_config["default"]))]:
        model.add_adapter(name, config)
        copied_numbers(model, model, name)
        model.set_adapter(name)
        torch.testing.assert_close(model(X), expected)
        model.set_adapter("default")
    written = tmp_path / "written"
    model.peft_config["default"].save_pretrained(written)
    other = net()
    other[2].weight.data.mul_(7.0)  # "auto" would come to another scale here
    fresh = get_peft_model(other, FloraConfig.from_pretrained(written)).eval()
    other[2].base_layer.weight.data.div_(7.0)
    copied_numbers(model, fresh, "default")
    torch.testing.assert_close(fresh(X), expected)


def test_a_shared_weight_is_untied_by_a_merge_and_tied_again():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = get_peft_model(Tied(), FloraConfig(r=2, target_modules=["embed"], init_weights=False)).eval()
    x = torch.arange(6).reshape(2, 3)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    inner = model.base_model.model
    assert inner.head.weight is inner.embed.base_parameter
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


def test_a_sum_of_loaded_adapters_travels(saved, tmp_path_factory):
    model = PeftModel.from_pretrained(net(), saved).eval()
    model.load_adapter(saved, "again")
    expected = model(X)
    model.add_weighted_adapter(["default", "again"], [0.25, 0.75], "sum")
    folder = tmp_path_factory.mktemp("sum")
    model.save_pretrained(folder, selected_adapters=["sum"])
    torch.testing.assert_close(PeftModel.from_pretrained(net(), folder / "sum").eval()(X), expected)


def test_weighted_sums_refuse_what_they_cannot_do():
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["0"]))
    for arguments, message in [
        ((["default"], [1.0, 2.0], "sum"), "1 adapters and 2 weights"),
        ((["absent"], [1.0], "sum"), r"adapters \['absent'\] do not exist"),
        ((["default"], [1.0], "default"), "exists already"),
        ((["default"], [1.0], "sum", "ties"), "combination_type must be one of linear, cat"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]
