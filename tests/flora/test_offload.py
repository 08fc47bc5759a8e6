"""A model that accelerate has offloaded runs, starts, merges and unmerges as it does in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch import nn

from cases import CASES
from flora import FloraConfig
from reference import first, layers
from test_contract import CLOSE, Holder, build, config

# these read weights of modules in them without calling the modules
WHOLE = ["MultiheadAttention", "Listed", "Keyed"]
OPTIONS = {"execution_device": torch.device("cpu"), "preload_module_classes": WHOLE}
# a list of parameters is a module that no forward calls: accelerate loads it with the module around it
LISTS = [case for case in CASES if case.id.startswith(("ParameterList", "ParameterDict"))]
every_case = pytest.mark.parametrize("case", [case for case in CASES if case not in LISTS], ids=lambda case: case.id)


def is_away(model: nn.Module) -> bool:
    return all(layer.base_parameter.is_meta for layer in layers(model))


@every_case
@torch.no_grad()
def test_an_adapted_model_is_offloaded(case):
    model, base, args = build(case)
    expected, plain = first(model(*args)), first(base(*args))
    cpu_offload(model, **OPTIONS)
    assert is_away(model)
    torch.testing.assert_close(first(model(*args)), expected, **CLOSE)
    model.merge_adapter()
    assert is_away(model)
    torch.testing.assert_close(first(model(*args)), expected, **CLOSE)
    model.unmerge_adapter()
    for layer in layers(model):
        layer.enable_adapters(False)
    assert torch.equal(first(model(*args)), plain)
    for layer in layers(model):
        layer.enable_adapters(True)
    torch.testing.assert_close(first(model.merge_and_unload(safe_merge=True)(*args)), expected, **CLOSE)


@every_case
def test_an_offloaded_model_is_adapted(case):
    torch.manual_seed(1)
    model, base, args = build(case)
    torch.manual_seed(1)
    offloaded = cpu_offload(Holder(copy.deepcopy(base)), **OPTIONS)
    torch.manual_seed(1)
    other = get_peft_model(offloaded, config(case)).eval()
    for ours, theirs in zip(layers(other), layers(model), strict=True):
        assert ours.space("default").scale == theirs.space("default").scale
        ours.tucker_space.load_state_dict(theirs.tucker_space.state_dict())
    expected = first(model(*args))
    torch.testing.assert_close(first(other(*args)), expected, **CLOSE)
    for one in (model, other):
        first(one.train()(*args)).square().sum().backward()
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad, ours.grad, msg=name, **CLOSE)


@pytest.mark.parametrize("case", LISTS, ids=lambda case: case.id)
@torch.no_grad()
def test_weights_that_a_module_around_them_loads_run_and_are_not_merged(case):
    model, base, args = build(case)
    expected = first(model(*args))
    cpu_offload(model, **OPTIONS)
    torch.testing.assert_close(first(model(*args)), expected, **CLOSE)
    with pytest.raises(ValueError, match="it or its adapter is on the meta device, without numbers; load both first"):
        model.merge_adapter()
    with pytest.raises(ValueError, match='scale="auto" needs the numbers of a weight'):
        get_peft_model(cpu_offload(Holder(base), **OPTIONS), config(case))


class Two(nn.Module):
    _no_split_modules = ()

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Conv1d(2, 2, 3, padding=1, groups=2)

    def forward(self, x):
        return self.two(self.one(x))


CONFIG = FloraConfig(target_modules=["one", "two"], init_weights=False)


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two()


@torch.no_grad()
def test_from_a_disk(tmp_path):
    model, x = (
        get_peft_model(two(), FloraConfig(target_modules=["one", "two"], init_weights=False)),
        torch.randn(3, 2, 6),
    )
    expected = model(x)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_an_adapter_is_loaded_onto_a_device_map(tmp_path):
    model, x = (
        get_peft_model(two(), FloraConfig(target_modules=["one", "two"], init_weights=False)),
        torch.randn(3, 2, 6),
    )
    model.save_pretrained(tmp_path / "adapter")
    places = {"one": "cpu", "two": "disk"}
    base = dispatch_model(two(), places, main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter")(x), model(x))


def test_a_weight_without_numbers_is_refused_before_anything_is_wrapped():
    model = Two()
    model.two.to("meta")
    with pytest.raises(ValueError, match=r"layer 'two' \(Conv1d\): scale=\"auto\" needs the numbers of a weight"):
        get_peft_model(model, FloraConfig(target_modules=["one", "two"]))
    assert type(model.one) is nn.Linear
    adapted = get_peft_model(model, FloraConfig(target_modules=["one", "two"], scale=1.0))
    before = adapted.base_model.model.one.weight.clone()
    with pytest.raises(ValueError, match=r"layer 'two', weight of shape \[2, 1, 3\]: it or its adapter is on the meta"):
        adapted.merge_adapter()
    assert torch.equal(adapted.base_model.model.one.weight, before)
