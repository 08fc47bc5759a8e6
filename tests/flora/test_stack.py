"""``stack="layers"``: same-shaped weights of several layers as one tensor of one mode more."""

from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn

import flora
from flora import FloraConfig, FloraLayer
from flora.convert import export_lora

EACH = ("mix", "widen", "conv")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.widen = nn.Linear(6, 6), nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(self.widen(torch.tanh(self.mix(x))).mT).mT)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base() -> Model:
    torch.manual_seed(0)
    return Model().double()


def adapted(seed: int = 0, **config) -> PeftModel:
    model = base()
    torch.manual_seed(seed)
    config = {"r": 2, "init_weights": False, "stack": "layers", "target_modules": [*EACH, "head"], **config}
    return get_peft_model(model, FloraConfig(**config))


@pytest.fixture
def model() -> PeftModel:
    return adapted()


def layers(model: nn.Module, name: str = "") -> list[FloraLayer]:
    return [m for m in model.modules() if isinstance(m, FloraLayer) and m.name.endswith(name)]


def spaces(model: nn.Module, name: str = "") -> list[flora.CoreSpace]:
    return [layer.space("default") for layer in layers(model, name)]


def deltas(model: nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    return [layer.get_delta_weight(adapter) for layer in layers(model)]


def is_tied(model: nn.Module) -> bool:
    first = {name: spaces(model, name)[0].factors for name in EACH}
    return all(set(space.factors) == set(first[name]) for name in EACH for space in spaces(model, name))


X = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("name", "equation"), [("mix", "lrs,ir,js->lij"), ("conv", "lrst,ir,js,kt->lijk")])
def test_a_stack_is_one_core_space_of_one_mode_more(model, name, equation):
    own = spaces(model, name)
    core = torch.stack([space.core * space.scale for space in own])
    expected = torch.einsum(equation, core, *own[0].factors)
    torch.testing.assert_close([layer.get_delta_weight("default") for layer in layers(model, name)], [*expected])


def test_a_plan_counts_shared_factors_once(model):
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.peft_config["default"].plan.total == trainable
    assert trainable == 2 * (2 * 6 * 2 + 3 * 4) + (2 * 6 * 2 + 3 * 2 + 3 * 8) + (2 * 6 * 2 + 4)


@pytest.mark.parametrize("budget", [120, 150, 200, 300])
def test_a_budget_is_kept(budget):
    model = adapted(r=None, budget=budget)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.85 * budget <= trainable <= budget
    assert all(len({space.ranks for space in spaces(model, name)}) == 1 for name in EACH)


def test_gradients_are_sums_over_the_layers(model):
    apart = adapted(stack=None)
    apart.load_state_dict(model.state_dict())
    for one in (model, apart):
        one(X).square().sum().backward()
    for name in (*EACH, "head"):
        own, others = spaces(model, name), spaces(apart, name)
        torch.testing.assert_close([s.core.grad for s in own], [s.core.grad for s in others])
        for n, factor in enumerate(own[0].factors):
            torch.testing.assert_close(factor.grad, sum(s.factors[n].grad for s in others))


def test_in_a_mixed_model_it_shares_too():
    config = FloraConfig(r=2, init_weights=False, stack="layers", target_modules=EACH)
    assert is_tied(get_peft_model(base(), config, mixed=True))


def test_a_fresh_adapter_changes_nothing():
    torch.testing.assert_close(adapted(init_weights=True)(X), base()(X))


def load_fresh(folder):
    return PeftModel.from_pretrained(base(), folder)


def load_on_meta(folder):
    return PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=True)


def load_by_assigning(folder):
    model = adapted(1)
    set_peft_model_state_dict(model, load_peft_weights(folder), low_cpu_mem_usage=True)
    return model


@pytest.mark.parametrize("load", [load_fresh, load_on_meta, load_by_assigning])
def test_saved_and_loaded_it_still_shares(model, tmp_path, load):
    model.save_pretrained(tmp_path)
    other = load(tmp_path)
    assert is_tied(other)
    torch.testing.assert_close(deltas(other), deltas(model))


@pytest.mark.parametrize("change", [deepcopy, nn.Module.float, lambda model: model.to("meta").to_empty(device="cpu")])
def test_copied_or_moved_it_still_shares(model, change):
    assert is_tied(change(model))
    assert is_tied(model)


def test_it_merges_and_exports(model, tmp_path):
    expected = model(X)
    model.save_pretrained(tmp_path / "flora")
    export_lora(tmp_path / "flora", tmp_path / "lora")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "lora")(X), expected)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_a_sum_of_adapters_has_factors_of_its_own(model):
    model.add_weighted_adapter(["default"], [2.0], "twice")
    assert model.peft_config["twice"].stack is None
    torch.testing.assert_close(deltas(model, "twice"), [2 * delta for delta in deltas(model)])


def test_a_file_whose_layers_disagree_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.blocks.1.mix.tucker_space.factor_0"] += 1
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=r"blocks.1.mix.*factor_0 differs from the factor of the first layer"):
        load_fresh(tmp_path)


def test_an_adapter_without_a_stack_cannot_be_swapped_in(model, tmp_path):
    adapted(1, stack=None).save_pretrained(tmp_path)
    before = deltas(model)
    with pytest.raises(ValueError, match="shares factors between layers"):
        flora.hotswap(model, tmp_path)
    torch.testing.assert_close(deltas(model), before)


def test_factors_that_an_engine_took_apart_are_reported(model):
    space = spaces(model, "mix")[1]
    space.factor_0 = nn.Parameter(space.factor_0.detach().clone())
    with pytest.raises(ValueError, match="something took apart the factors"):
        model(X)


def test_layers_with_other_ranks_stay_apart():
    first, second, third = spaces(adapted(rank_pattern={"blocks.1.mix": 3}, target_modules=["mix"]))
    assert first.factors[0] is third.factors[0]
    assert second.factors[0].shape == (6, 3)


@pytest.mark.parametrize("fields", [{"stack": "all"}, {"stack": "layers", "init": "gradient"}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match="stack"):
        FloraConfig(**fields)
