"""Conversions: every file that is written is read back by the program it is for, in float64."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from cases import CASES, CONV, Case
from flora import FloraConfig
from flora.convert import compress, export_diffusers, export_locon, export_lora, import_lora, import_official, merge
from flora.convert.adapter import Adapter
from flora.files import WEIGHTS
from flora.layers.kinds import LINEAR
from reference import first
from test_contract import Holder, build

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# what PEFT's LoRA has no form for, by the row's name
NO_LORA = {
    case.id
    for case in CASES
    if any(word in case.id for word in ("groups", "depthwise", "wide_kernel", "dilation", "circular", "reflect"))
    or any(word in case.id for word in ("own_forward", "max_norm", "by_freq", "same_even", "same", "Transpose"))
    or case.id.startswith(("EmbeddingBag", "Bilinear", "MultiheadAttention", "LayerNorm", "Parameter"))
    or case.id in ("parameter-9", "parameter-3x2x2x4", "parameter-2x3x2x2x3", "parameter-2x2x3x2x2x2")
}


def saved(case: Case, folder: Path, **options):
    """(the adapter's folder, a copy of its base model, the outputs, inputs)."""
    model, base, args = build(case, **options)
    model.save_pretrained(str(folder / "flora"))
    with torch.no_grad():
        return folder / "flora", Holder(base), first(model(*args)), args


def loaded(base, folder, *args):
    with torch.no_grad():
        return first(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(*args))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("case", [c for c in CASES if c.id not in NO_LORA], ids=lambda case: case.id)
def test_a_lora_gives_the_same_outputs_and_so_does_its_way_back(case, ragged, tmp_path):
    adapter, base, expected, args = saved(case, tmp_path)
    export_lora(adapter, tmp_path / "lora", ragged=ragged)
    torch.testing.assert_close(loaded(base, tmp_path / "lora", *args), expected, **CLOSE)
    import_lora(tmp_path / "lora", tmp_path / "back")
    torch.testing.assert_close(loaded(base, tmp_path / "back", *args), expected, **CLOSE)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in NO_LORA], ids=lambda case: case.id)
def test_what_has_no_lora_form_is_named_and_nothing_is_written(case, tmp_path):
    adapter, *_ = saved(case, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)layer.*flora merge"):
        export_lora(adapter, tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["flora"]


@st.composite
def convolutions(draw):
    """(a convolution, the ranks of an adapter, inputs), of 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    groups = draw(st.sampled_from([1, 1, 2]))
    layer = CONV[dims](2 * groups, 3 * groups, kernel, groups=groups, bias=draw(st.booleans()))
    ranks = [draw(st.integers(1, size)) for size in layer.weight.shape]
    return layer.double(), ranks, torch.randn(2, 2 * groups, *(5,) * dims, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(problem=convolutions())
def test_any_convolution_is_exact_or_refused(problem, tmp_path_factory):
    layer, ranks, x = problem
    folder = tmp_path_factory.mktemp("any")
    base = Holder(layer)
    model = get_peft_model(copy.deepcopy(base), FloraConfig(r=ranks, target_modules=["layer"], init_weights=False))
    model.save_pretrained(str(folder / "flora"))
    if layer.groups > 1:
        with pytest.raises(ValueError, match="grouped"):
            export_lora(folder / "flora", folder / "lora")
    else:
        said = export_lora(folder / "flora", folder / "lora")
        assert f"rank {min(ranks[0], math.prod(ranks[1:]))}," in said
        torch.testing.assert_close(loaded(base, folder / "lora", x), model(x).detach(), **CLOSE)


class Mixed(nn.Module):
    """A layer with a LoRA form, and one without: grouped, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, groups=2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_layers_without_a_lora_form_can_be_saved_whole(tmp_path):
    base, x = Mixed().double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    config = FloraConfig(r=2, target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(str(tmp_path / "flora"))
    said = export_lora(tmp_path / "flora", tmp_path / "lora", merge_rest=tmp_path / "base.safetensors")
    assert "saved whole: second" in said
    torch.testing.assert_close(loaded(base, tmp_path / "lora", x), model(x).detach(), **CLOSE)


# (what is spoilt in the adapter's folder, what the message says)
SPOILT = {
    "no_config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "has no adapter in it: there is no adapter_config.json",
    ),
    "other_method": (lambda folder: edit(folder, peft_type="LOHA"), "peft_type 'LOHA'; 'FLORA' is needed"),
    "no_kinds": (lambda folder: edit(folder, weights=None), "load the adapter onto its model"),
    "strange_kinds": (
        lambda folder: edit(folder, weights={"layer": {"sort": 1}}),
        "'weights' was not written by flora, or is corrupt",
    ),
    "truncated": (lambda folder: cut_short(folder), "not a whole safetensors file"),
    "missing": (lambda folder: change(folder, "factor_1", None), "factor_1' is missing"),
    "shape": (lambda folder: change(folder, "factor_0", torch.ones(5, 2)), r"factor_0' has shape \[5, 2\].*3 columns"),
    "modes": (lambda folder: change(folder, "factor_0", torch.ones(5)), "2 modes are needed"),
    "no_scale": (lambda folder: change(folder, "scale", None), "scale' is missing"),
    "unlisted": (lambda folder: rename(folder, "layer", "other"), "layer.tucker_space.core' is missing"),
    "more_than_listed": (lambda folder: add_layer(folder), "other.tucker_space.core', which 'weights' in .* not list"),
    "nan": (lambda folder: fill(folder, "core", torch.nan), "'layer'.*update is not finite"),
    "infinite": (lambda folder: fill(folder, "factor_1", torch.inf), "'layer'.*update is not finite"),
    "nan_scale": (lambda folder: fill(folder, "scale", torch.nan), "'layer'.*update is not finite"),
    "overflow": (lambda folder: fill(folder, "", 1e200), "'layer'.*update is not finite"),
}


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut_short(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])


def change(folder: Path, name: str, tensor) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if key.endswith(name))
    tensors.pop(key)
    save_file(tensors | ({} if tensor is None else {key: tensor}), folder / WEIGHTS)


def add(folder: Path, name: str, tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | {f"base_model.model.{name}": tensor}, folder / WEIGHTS)


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace(f".{old}.", f".{new}."): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def add_layer(folder: Path) -> None:
    before = load_file(folder / WEIGHTS)
    rename(folder, "layer", "other")
    save_file(before | load_file(folder / WEIGHTS), folder / WEIGHTS)


def fill(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    filled = {key: torch.full_like(tensor, value) for key, tensor in tensors.items() if key.endswith(name)}
    save_file(tensors | filled, folder / WEIGHTS)


def readers(folder: Path):
    """All that reads an adapter's folder to write something else, by name."""
    save_file({"layer.weight": torch.ones(5, 7)}, folder / "base.safetensors")
    return {
        "lora": lambda adapter, out: export_lora(adapter, out),
        "locon": lambda adapter, out: export_locon(adapter, out.with_suffix(".safetensors")),
        "diffusers": lambda adapter, out: export_diffusers(adapter, out, component="unet"),
        "merge": lambda adapter, out: merge(folder / "base.safetensors", adapter, out.with_suffix(".safetensors")),
        "compress": lambda adapter, out: compress(adapter, out, rank=1),
    }


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_adapter_is_refused_by_file_and_key(spoil, message, tmp_path):
    adapter, *_ = saved(CASES[0], tmp_path)
    spoil(adapter)
    for read in readers(tmp_path).values():
        with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{message}"):
            read(adapter, tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "flora"]


@pytest.mark.parametrize("form", ["lora", "merge", "compress"])
def test_a_head_that_is_not_finite_is_refused(form, tmp_path):
    adapter, *_ = saved(CASES[0], tmp_path)
    add(adapter, "head.weight", torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="head.weight', shape .* is not finite"):
        readers(tmp_path)[form](adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["lora", "locon", "diffusers"])
def test_numbers_that_a_format_cannot_hold_are_refused(form, tmp_path):
    adapter, *_ = saved(CASES[0], tmp_path)
    save_file({key: tensor.half() for key, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    for name, value in (("core", 300), ("factor_0", 0), ("factor_1", 300), ("scale", 1)):  # A overflows, B A is 0
        fill(adapter, name, value)
    with pytest.raises(ValueError, match="'layer'.*not finite in torch.float16"):
        readers(tmp_path)[form](adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("spoil", ["missing", "shape", "modes", "no_scale", "more_than_listed"])
def test_a_spoilt_adapter_is_not_loaded_either(spoil, tmp_path):
    adapter, base, *_ = saved(CASES[0], tmp_path)
    SPOILT[spoil][0](adapter)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="tucker_space|layer 'layer'"):
        PeftModel.from_pretrained(base, str(adapter))
    assert base.state_dict().keys() == before.keys()


class TwoLayers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Linear(5, 4))


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize("named, given", [(["0"], ["0", "1"]), (["0", "1"], ["1"])], ids=["more", "fewer"])
def test_the_config_of_layers_that_a_state_dict_names_lists_them(named, given, tmp_path):
    donor = inject_adapter_in_model(FloraConfig(r=2, target_modules=given, init_weights=False), TwoLayers())
    state, config = get_peft_model_state_dict(donor), FloraConfig(r=2, target_modules=named)
    model = inject_adapter_in_model(config, TwoLayers(), state_dict=state)
    set_peft_model_state_dict(model, state)
    config.save_pretrained(str(tmp_path / "flora"))
    save_file({f"base_model.model.{key}": tensor for key, tensor in state.items()}, tmp_path / "flora" / WEIGHTS)
    export_lora(tmp_path / "flora", tmp_path / "lora")
    lora = PeftModel.from_pretrained(TwoLayers(), str(tmp_path / "lora")).base_model.model
    for name in given:
        expected = donor.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(lora.get_submodule(name).get_delta_weight("default"), expected)
    assert sum(hasattr(layer, "lora_A") for layer in lora) == len(given)


def test_what_is_there_already_is_not_written_over(tmp_path):
    adapter, *_ = saved(CASES[0], tmp_path)
    export_lora(adapter, tmp_path / "lora")
    with pytest.raises(FileExistsError, match="exists already"):
        export_lora(adapter, tmp_path / "lora")


SPOILT_LORA = {
    "dora": (lambda folder: edit(folder, use_dora=True), "use_dora"),
    "rank": (lambda folder: edit(folder, r=2), "not those of rank 2"),
    "half": (lambda folder: change(folder, "lora_B.weight", None), "lora_B.weight' is missing"),
    "other": (lambda folder: edit(folder, peft_type="IA3"), "'LORA' is needed"),
}


@pytest.mark.parametrize("spoil, message", SPOILT_LORA.values(), ids=SPOILT_LORA)
def test_a_spoilt_lora_is_refused(spoil, message, tmp_path):
    adapter, *_ = saved(CASES[0], tmp_path)
    export_lora(adapter, tmp_path / "lora")
    spoil(tmp_path / "lora")
    with pytest.raises(ValueError, match=message):
        import_lora(tmp_path / "lora", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dims", [0, 2, 3], ids=["linear", "conv2d", "conv3d"])
def test_the_authors_checkpoint(dims, tmp_path):
    kernel = (3, 2, 3)[:dims]
    layer = nn.Linear(4, 5) if not dims else {2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 5, kernel)
    base = Holder(layer.double())
    sizes, ranks = (4, 5, *kernel), (2, 3, *(2 for _ in kernel))
    stem = "model.layer.flora_layer.param_"
    core = torch.randn(ranks, dtype=torch.float64)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(sizes, ranks, strict=True)]
    state = {f"{stem}G": core, **{f"{stem}{n}": factor for n, factor in enumerate(factors)}}
    torch.save({**state, "model.layer.base_layer.weight": layer.weight}, tmp_path / "authors.pt")
    import_official(tmp_path / "authors.pt", tmp_path / "flora", scale=0.4)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "flora"))
    letters = "abcde"[: len(sizes)]
    equation = ",".join([letters.upper(), *(f"{i}{i.upper()}" for i in letters)])
    expected = torch.einsum(f"{equation}->ba{letters[2:]}", core, *factors)
    torch.testing.assert_close(model.base_model.model.layer.get_delta_weight("default"), 0.4 * expected, **CLOSE)


def test_a_layer_and_a_raw_parameter_of_it_can_be_loaded_again(tmp_path):
    base, x = nn.Sequential(nn.Linear(4, 5)).double(), torch.randn(3, 4, dtype=torch.float64)
    config = FloraConfig(r=2, target_modules=["0"], target_parameters=["0.bias"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(str(tmp_path / "flora"))
    torch.testing.assert_close(loaded(base, tmp_path / "flora", x), model(x).detach(), **CLOSE)


class Embeddings(nn.Module):
    """A raw parameter beside layers, all of them adapted: as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.project = nn.Parameter(torch.randn(1, 2, 5)), nn.Linear(4, 5)

    def forward(self, x):
        return self.project(x) * self.token.sum(1)


def test_a_raw_parameter_beside_adapted_layers_in_its_module(tmp_path):
    base, x = nn.Sequential(Embeddings(), nn.Linear(5, 3)).double(), torch.randn(3, 4, dtype=torch.float64)
    options = {"target_modules": ["0.project", "1"], "target_parameters": ["0.token"], "init_weights": False}
    model = get_peft_model(copy.deepcopy(base), FloraConfig(r=2, **options))
    model.add_adapter("second", FloraConfig(r=1, **options))
    model.save_pretrained(str(tmp_path))
    for adapter, folder in ("default", tmp_path), ("second", tmp_path / "second"):
        model.set_adapter(adapter)
        expected = model(x).detach()
        torch.testing.assert_close(loaded(base, folder, x), expected, **CLOSE)
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    torch.testing.assert_close(merged(x).detach(), expected, **CLOSE)


def test_a_linear_layer_of_an_embeddings_module_is_no_embedding(tmp_path):
    base = nn.Module()
    base.embedding = nn.Sequential(nn.Linear(5, 7))  # "embedding" is in the keys of its LoRA
    get_peft_model(base, FloraConfig(r=2, target_modules=["0"], init_weights=False)).save_pretrained(str(tmp_path))
    export_lora(tmp_path, tmp_path / "lora")
    import_lora(tmp_path / "lora", tmp_path / "back")
    before, after = (next(Adapter.open(folder).updates()) for folder in (tmp_path, tmp_path / "back"))
    assert after.site.kind is LINEAR and after.shape == (7, 5)
    zero = torch.zeros(7, 5)
    torch.testing.assert_close(after.merged_into(zero), before.merged_into(zero))


def test_adapters_on_the_hub(monkeypatch, tmp_path):
    adapter, base, expected, args = saved(CASES[0], tmp_path)
    folders = {"someone/flora": adapter, "someone/lora": tmp_path / "lora"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folders[name]))
    export_lora("someone/flora", tmp_path / "lora")
    import_lora("someone/lora", tmp_path / "back")
    torch.testing.assert_close(loaded(base, tmp_path / "back", *args), expected, **CLOSE)
