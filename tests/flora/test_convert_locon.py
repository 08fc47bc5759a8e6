"""LoCon and diffusers files: read back by LyCORIS and by diffusers themselves, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import loaded, saved
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cases import CASES, CONV, StandardizedConv2d
from commands import assert_refused, flora
from flora import FloraConfig
from flora.convert.diffusers import export_diffusers
from flora.convert.locon import export_locon, name_of
from flora.convert.locon_import import import_locon
from flora.convert.sgm import is_sdxl, sgm_names
from flora.convert.verification import verify
from test_contract import Holder

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# LyCORIS would pad the update with zeros, or run it without the layer's own forward
NO_LOCON = ("circular", "reflect", "replicate", "own_forward")
LOCON = [
    case
    for case in CASES
    if case.id.startswith(("Linear", "Conv1d", "Conv2d", "Conv3d")) and not any(word in case.id for word in NO_LOCON)
    if case.id != "Conv1d-same_even_kernel"  # circular, too
]


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """LyCORIS and diffusers build their layers in the default dtype."""
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lycoris")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_lycoris(base: nn.Module, file: Path, way: str = "merge_to") -> nn.Module:
    model = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    assert len(network.loras) == len({key.partition(".")[0] for key in load_file(file)})
    getattr(network, way)()
    return model


@torch.no_grad()
def run(model: nn.Module, *args):
    return model(*args)


# ------------------------------------------------------------------------------------------------------ LoCon, by case


@pytest.mark.parametrize("folded", [False, True], ids=["tucker", "folded"])
@pytest.mark.parametrize("case", LOCON, ids=lambda case: case.id)
def test_a_locon_gives_the_same_outputs_and_so_does_its_way_back(case, folded, tmp_path):
    adapter, base, expected, args = saved(case, tmp_path)
    file = tmp_path / "locon.safetensors"
    said = export_locon(adapter, file, folded=folded)
    assert str(file) in said and "1 weights" in said
    for way in ("apply_to", "merge_to"):
        torch.testing.assert_close(run(by_lycoris(base, file, way), *args), expected, **CLOSE)
    import_locon(file, Holder(case.make()).to("meta"), tmp_path / "back")
    torch.testing.assert_close(loaded(base, tmp_path / "back", *args), expected, **CLOSE)


@pytest.mark.parametrize("case", [c for c in CASES if c not in LOCON], ids=lambda case: case.id)
def test_what_has_no_form_is_named_and_nothing_is_written(case, tmp_path):
    adapter, *_ = saved(case, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)layer.*flora merge"):
        export_locon(adapter, tmp_path / "locon.safetensors")
    with pytest.raises(ValueError, match=r"(?s)layer.*flora merge"):
        export_diffusers(adapter, tmp_path / "diffusers", component="unet")
    assert [path.name for path in tmp_path.iterdir()] == ["flora"]


@st.composite
def convolutions(draw):
    """(layer, ranks)"""
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    groups, out, inputs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    layer = CONV[len(kernel)](groups * inputs, groups * out, kernel, groups=groups, bias=draw(st.booleans()))
    return layer, [draw(st.integers(1, 6)) for _ in layer.weight.shape]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_any_kernel_groups_and_ranks(some, folded):
    layer, ranks = some
    model = Holder(layer)
    tuned = get_peft_model(
        copy.deepcopy(model), FloraConfig(r=ranks, target_modules=["layer"], scale=0.7, init_weights=False)
    )
    with TemporaryDirectory() as folder:
        tuned.save_pretrained(f"{folder}/flora")
        export_locon(f"{folder}/flora", f"{folder}/locon.safetensors", folded=folded)
        theirs = by_lycoris(model, f"{folder}/locon.safetensors").layer.weight
        import_locon(f"{folder}/locon.safetensors", model, f"{folder}/back")
        back = PeftModel.from_pretrained(copy.deepcopy(model), f"{folder}/back").merge_and_unload().layer.weight
    expected = tuned.merge_and_unload().layer.weight
    torch.testing.assert_close(theirs, expected, **CLOSE)
    torch.testing.assert_close(back, expected, **CLOSE)


# ------------------------------------------------------------------------------------------------- LoCon of other hands


def layer_file(**changes) -> dict[str, torch.Tensor]:
    """A Tucker LoCon of Conv2d(4, 6, 3), with some tensors changed, or taken out by None."""
    tensors = {
        "lora_down.weight": torch.randn(3, 4, 1, 1),
        "lora_mid.weight": torch.randn(3, 3, 3, 3),
        "lora_up.weight": torch.randn(6, 3, 1, 1),
        "alpha": torch.tensor(2.0),
    }
    tensors |= {name.replace("_weight", ".weight"): value for name, value in changes.items()}
    return {
        f"lycoris_layer.{name}": value.double() if value.is_floating_point() else value
        for name, value in tensors.items()
        if value is not None
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha": torch.tensor(3)},
        {"alpha": torch.tensor(0.0)},
        {"lora_mid_weight": None, "lora_down_weight": torch.ones(5, 4, 3, 3), "lora_up_weight": torch.ones(6, 5, 1, 1)},
        {"lora_mid_weight": None, "lora_down_weight": torch.ones(9, 4, 3, 3), "lora_up_weight": torch.ones(6, 9, 1, 1)},
    ],
    ids=["alpha", "alpha_whole", "alpha_zero", "no_mid", "rank_over_size"],
)
def test_alpha_and_ranks_are_read_as_lycoris_does(changes, tmp_path):
    base, x = Holder(nn.Conv2d(4, 6, 3)), torch.randn(2, 4, 6, 6)
    save_file(layer_file(**changes), tmp_path / "locon.safetensors")
    import_locon(tmp_path / "locon.safetensors", base, tmp_path / "back")
    expected = run(by_lycoris(base, tmp_path / "locon.safetensors"), x)
    torch.testing.assert_close(loaded(base, tmp_path / "back", x), expected, **CLOSE)


def test_what_lycoris_has_trained_comes_over(tmp_path):
    x = torch.randn(2, 4, 7, 7)
    layers = nn.Conv2d(4, 6, (3, 1)), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(90, 5)
    model = nn.Sequential(*layers)
    base = copy.deepcopy(model)
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, conv_dim=3, conv_alpha=1, use_tucker=True)
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network.save_weights(str(tmp_path / "locon.safetensors"), None, {})
    import_locon(tmp_path / "locon.safetensors", base, tmp_path / "back")
    torch.testing.assert_close(loaded(base, tmp_path / "back", x), run(model, x), **CLOSE)


def test_without_alpha_the_scale_is_one_and_ones_at_the_end_do_not_matter(tmp_path):
    base, x = Holder(nn.Linear(7, 5)), torch.randn(3, 7)
    down, up = torch.randn(2, 7, 1, 1), torch.randn(5, 2, dtype=torch.float32)
    save_file({"net_layer.lora_down.weight": down, "net_layer.lora_up.weight": up}, tmp_path / "locon.safetensors")
    import_locon(tmp_path / "locon.safetensors", base, tmp_path / "back", prefix="net")
    expected = run(base, x) + x @ down.flatten(1).T @ up.double().T
    torch.testing.assert_close(loaded(base, tmp_path / "back", x), expected, **CLOSE)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_thin_product_stays_thin(kernel, tmp_path):
    pair = {"lora_down.weight": torch.randn(2, 64, kernel, kernel), "lora_up.weight": torch.randn(6, 2, 1, 1)}
    save_file({f"lycoris_layer.{name}": tensor for name, tensor in pair.items()}, tmp_path / "locon.safetensors")
    import_locon(tmp_path / "locon.safetensors", Holder(nn.Conv2d(64, 6, kernel)), tmp_path / "back")
    size = sum(tensor.numel() for tensor in load_file(tmp_path / "back" / "adapter_model.safetensors").values())
    assert size < 64 * 64


def test_a_layer_whose_name_another_ends_in_is_left_alone(tmp_path):
    base, x = nn.ModuleDict({"layer": nn.Linear(4, 4), "deep": Holder(nn.Linear(4, 4))}), torch.randn(3, 4)
    pair = {"lora_down.weight": torch.randn(2, 4), "lora_up.weight": torch.randn(4, 2)}
    save_file({f"lycoris_layer.{name}": tensor for name, tensor in pair.items()}, tmp_path / "locon.safetensors")
    import_locon(tmp_path / "locon.safetensors", base, tmp_path / "back")
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "back")).base_model.model
    assert not torch.equal(run(model["layer"], x), run(base["layer"], x))
    assert torch.equal(run(model["deep"], x), run(base["deep"], x))


FOREIGN = {
    "dora": (layer_file(dora_scale=torch.ones(6)), r"lycoris_layer.dora_scale.*lora_up.weight.*alpha are known"),
    "loha": ({"lycoris_layer.hada_w1_a": torch.ones(6, 2)}, r"lycoris_layer.hada_w1_a.*are known"),
    "lokr": ({"lycoris_layer.lokr_w1": torch.ones(2, 2)}, r"lycoris_layer.lokr_w1.*are known"),
    "no up": (layer_file(lora_up_weight=None), r"lycoris_layer.lora_up.weight' is missing"),
    "no down": (layer_file(lora_down_weight=None), r"lycoris_layer.lora_down.weight' is missing"),
    "up": (layer_file(lora_up_weight=torch.ones(5, 3, 1, 1)), r"lora_up.*\[5, 3, 1, 1\]; \[6, 3\].*\[6, 4, 3, 3\]"),
    "down": (layer_file(lora_down_weight=torch.ones(2, 4, 1, 1)), r"lora_down.*\[2, 4, 1, 1\]; \[3, 4\]"),
    "mid": (layer_file(lora_mid_weight=torch.ones(3, 3, 3)), r"lora_mid.*\[3, 3, 3\]; \[3, 3, 3, 3\]"),
    "scalar": (layer_file(lora_mid_weight=torch.tensor(1.0)), r"lora_down.*is needed"),
    "no rank": (layer_file(lora_mid_weight=torch.ones(3, 0, 3, 3), lora_down_weight=torch.ones(0, 4)), r"\[0, 4\]"),
    "integers": (layer_file(lora_up_weight=torch.ones(6, 3, 1, 1).int()), r"lora_up.*torch.int32.*torch.float16"),
    "alpha": (layer_file(alpha=torch.tensor(float("nan"))), r"alpha is nan; a finite number"),
    "alphas": (layer_file(alpha=torch.ones(2)), r"alpha is \[1.0, 1.0\]"),
    "layer": ({"lycoris_other.lora_up.weight": torch.ones(1), "lycoris_other.lora_down.weight": torch.ones(1)},
              r"lycoris_other.*no such layer"),
    "prefix": ({"unet.conv_in.lora_A.weight": torch.ones(1)}, r"'unet' does not begin with lora_unet_.*prefix="),
    "prefixes": ({f"lora_{name}_x.alpha": torch.ones(1) for name in ("te1", "unet")},
                 r"2 models \(lora_te1, lora_unet\).*prefix="),
    "empty": ({}, r"0 models"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, message", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_locon_is_named_and_nothing_is_written(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "locon.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)locon.safetensors.*{message}"):
        import_locon(tmp_path / "locon.safetensors", Holder(nn.Conv2d(4, 6, 3)), tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["locon.safetensors"]


BASES = {
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding_mode="circular"), "circular.*'layer' is a Conv2d"),
    "own forward": (lambda: StandardizedConv2d(4, 6, 3), "more with its weight.*StandardizedConv2d"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), "no form for ConvTranspose"),
    "normalisation": (lambda: nn.LayerNorm(6), "'layer' is a LayerNorm"),
    "no weight": (nn.ReLU, "'weight' is not a parameter of ReLU"),
}


@pytest.mark.parametrize("make, message", BASES.values(), ids=BASES)
def test_a_layer_of_the_base_that_locon_does_not_fit_is_named(make, message, tmp_path):
    save_file(layer_file(), tmp_path / "locon.safetensors")
    with pytest.raises(ValueError, match=f"lycoris_layer.*{message}"):
        import_locon(tmp_path / "locon.safetensors", Holder(make()), tmp_path / "back")


def test_a_name_that_may_be_two_layers_is_refused_on_both_ways(tmp_path):
    base = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(2, 2)}), "a_b": nn.ModuleDict({"c": nn.Linear(2, 2)})})
    pair = {"lora_down.weight": torch.randn(1, 2), "lora_up.weight": torch.randn(2, 1)}
    save_file({f"lycoris_a_b_c.{name}": tensor for name, tensor in pair.items()}, tmp_path / "locon.safetensors")
    with pytest.raises(ValueError, match="lycoris_a_b_c.*may be a.b_c or a_b.c"):
        import_locon(tmp_path / "locon.safetensors", base, tmp_path / "back")
    get_peft_model(base, FloraConfig(r=1, target_modules=["b_c", "c"])).save_pretrained(str(tmp_path / "flora"))
    with pytest.raises(ValueError, match="two layers would be 'lycoris_a_b_c'.*'a_b.c'"):
        export_locon(tmp_path / "flora", tmp_path / "new.safetensors")


def test_a_file_is_not_overwritten_nor_is_anything_left_out(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    config = FloraConfig(r=1, target_modules=["layer"], modules_to_save=["head"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "flora"))
    (tmp_path / "old.safetensors").touch()
    with pytest.raises(FileExistsError, match="old.safetensors exists already"):
        export_locon(tmp_path / "flora", tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        export_locon(tmp_path / "flora", tmp_path / "new.pt")
    with pytest.raises(ValueError, match="head.*no place"):
        export_locon(tmp_path / "flora", tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match="head.*no place"):
        export_diffusers(tmp_path / "flora", tmp_path / "new", component="unet")
    with pytest.raises(ValueError, match="component="):
        export_diffusers(tmp_path / "flora", tmp_path / "new")


# ------------------------------------------------------------------------------------------------------------ pipelines


def unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, **options,
    )  # fmt: skip


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's levels and blocks; their number is what the names depend on."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 4, 8), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        transformer_layers_per_block=[1, 1, 2], addition_time_embed_dim=4, projection_class_embeddings_input_dim=30,
    )  # fmt: skip


def text_model(cls) -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "projection_dim": 6, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return cls(CLIPTextConfig(**sizes, **ids, num_attention_heads=2, max_position_embeddings=8)).double()


def components(xl: bool) -> dict[str, nn.Module]:
    if not xl:
        return {"unet": unet(), "text_encoder": text_model(CLIPTextModel)}
    return {
        "unet": sdxl_unet(),
        "text_encoder": text_model(CLIPTextModel),
        "text_encoder_2": text_model(CLIPTextModelWithProjection),
    }


def transformer() -> SD3Transformer2DModel:
    widths = dict.fromkeys(["joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"], 8)
    heads = {"attention_head_dim": 4, "num_attention_heads": 2, "num_layers": 2}
    return SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, pos_embed_max_size=8, **widths, **heads)


def pipeline(models: dict[str, nn.Module]):
    xl = "text_encoder_2" in models
    absent = ["vae", "tokenizer", "image_encoder", "feature_extractor", "tokenizer_2" if xl else "safety_checker"]
    options = dict.fromkeys(absent) | ({} if xl else {"requires_safety_checker": False}) | copy.deepcopy(models)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline)(**options, scheduler=scheduler)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    if isinstance(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        return model(torch.arange(6).view(1, 6))[0]
    x, step = torch.linspace(-1, 1, 256).view(1, 4, 8, 8), torch.tensor([5])
    text = torch.linspace(0, 1, 24).view(1, 3, 8)
    if isinstance(model, SD3Transformer2DModel):
        return model(x, text, torch.ones(1, 8), step).sample
    added = {"text_embeds": torch.ones(1, 6), "time_ids": torch.ones(1, 6)}
    return model(x, step, text, added_cond_kwargs=added).sample


RANKS = {
    "conv_in": 3, "conv1": [2, 5, 2, 3], "conv2": 3, "conv": 2, "conv_shortcut": [3, 2, 1, 1], "to_q": [4, 2],
    "to_out.0": 3, "proj_in": 2, "time_embedding.linear_1": 5, "time_emb_proj": 3, "add_embedding.linear_1": 2,
    "q_proj": 1, "out_proj": 2, "fc1": 3, "text_projection": 2,
}  # fmt: skip


def tuned(model: nn.Module, folder: Path, names=RANKS) -> torch.Tensor:
    """The outputs with an adapter, which is saved in the folder."""
    present = [f".{module}" for module, _ in model.named_modules()]
    ranks = {name: RANKS[name] for name in names if any(module.endswith(f".{name}") for module in present)}
    config = FloraConfig(rank_pattern=ranks, target_modules=list(ranks), scale=0.3, init_weights=False)
    peft = get_peft_model(copy.deepcopy(model), config)
    peft.save_pretrained(str(folder))
    return outputs(peft.base_model.model)


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_a_pipeline_loads_all_its_parts_from_one_file(xl, kohya, tmp_path):
    models = components(xl)
    # of kohya's text_projection diffusers asks the most frequent rank
    names = [name for name in RANKS if not (kohya and name == "text_projection")]
    expected = {name: tuned(model, tmp_path / name, names) for name, model in models.items()}
    encoders = {name: tmp_path / name for name in models if name != "unet"}
    if kohya:
        export_locon(tmp_path / "unet", tmp_path / "out" / "kohya.safetensors", folded=True, **encoders)
    else:
        export_diffusers(tmp_path / "unet", tmp_path / "out", **encoders)
    loaded = pipeline(models)
    loaded.load_lora_weights(tmp_path / "out")
    for name, model in models.items():
        torch.testing.assert_close(outputs(getattr(loaded, name)), expected[name], **CLOSE)
        assert not torch.equal(outputs(model), expected[name])


def test_kohya_names(tmp_path):
    """What programs look for, in letters."""
    models = components(xl=True)
    layers = {"unet": "conv_in", "text_encoder": "q_proj", "text_encoder_2": "text_projection"}
    for name, layer in layers.items():
        tuned(models[name], tmp_path / name, [layer])
    file = tmp_path / "kohya.safetensors"
    export_locon(**{"adapter" if name == "unet" else name: tmp_path / name for name in layers}, out=file)
    linear, kernel = ["lora_down.weight", "lora_up.weight", "alpha"], ["lora_mid.weight"]
    q_proj = "text_model_encoder_layers_{}_self_attn_q_proj"
    names = {f"lora_te1_{q_proj.format(n)}": linear for n in range(2)}
    names |= {"lora_unet_input_blocks_0_0": linear + kernel, "lora_te2_text_projection": linear}
    tensors = load_file(file)
    assert set(tensors) == {f"{name}.{end}" for name, ends in names.items() for end in ends}
    for name in names:
        assert tensors[f"{name}.alpha"] == tensors[f"{name}.lora_down.weight"].shape[0]
    assert tensors["lora_unet_input_blocks_0_0.lora_mid.weight"].shape == (3, 3, 3, 3)  # ComfyUI takes square ones only
    for name, prefix in zip(layers, ("lora_unet", "lora_te1", "lora_te2"), strict=True):
        import_locon(file, models[name], tmp_path / prefix, prefix=prefix)
        back = PeftModel.from_pretrained(copy.deepcopy(models[name]), str(tmp_path / prefix)).base_model.model
        there = PeftModel.from_pretrained(copy.deepcopy(models[name]), str(tmp_path / name)).base_model.model
        torch.testing.assert_close(outputs(back), outputs(there), **CLOSE)

    export_locon(tmp_path / "text_encoder", tmp_path / "one.safetensors")
    assert f"lora_te_{q_proj.format(1)}.alpha" in load_file(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="would both be 'lora_te'"):
        export_locon(tmp_path / "unet", tmp_path / "x.safetensors", prefix="lora_te", text_encoder=tmp_path / "unet")


SDXL_NAMES = {
    "add_embedding.linear_1": "lora_unet_label_emb_0_0",
    "up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "down_blocks.1.downsamplers.0.conv": "lora_unet_input_blocks_6_0_op",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.2": "lora_unet_middle_block_1_transformer_blocks_1_ff_net_2",
}


def test_a_unet_of_sdxl_has_the_names_by_which_a1111_finds_every_layer(tmp_path):
    """It reads lora_unet_X as X of the original checkpoint, and SDXL's first text encoder as lora_te1."""
    models = components(xl=True)
    config = FloraConfig(r=2, target_modules=list(SDXL_NAMES), init_weights=False)
    get_peft_model(models["unet"], config).save_pretrained(str(tmp_path / "unet"))
    tuned(models["text_encoder"], tmp_path / "text", ["fc1"])
    export_locon(tmp_path / "unet", tmp_path / "out.safetensors", text_encoder=tmp_path / "text")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "out.safetensors")}
    assert names == {*SDXL_NAMES.values(), *(f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1" for n in range(2))}


def test_names_of_other_unets_stay(tmp_path):
    """SD 1 has no layer that only SDXL has; the refiner's fourth level tells it from SDXL."""
    sd = ["down_blocks.3.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"]
    assert not is_sdxl(sd) and not is_sdxl([*sd, *SDXL_NAMES])
    assert all(is_sdxl([name]) for name in SDXL_NAMES if not name.endswith("samplers.0.conv"))


def test_a1111_finds_all_four_projections_of_an_attention_layer(tmp_path):
    """It has them as one layer in SDXL's second text encoder, and adds nothing to it where one is missing."""
    models, layers = components(xl=True), {"unet": "conv_in", "text_encoder_2": "q_proj"}
    expected = {name: tuned(models[name], tmp_path / name, [layer]) for name, layer in layers.items()}
    folders = {"adapter": tmp_path / "unet", "text_encoder_2": tmp_path / "text_encoder_2"}
    export_locon(**folders, out=tmp_path / "out.safetensors", folded=True)
    tensors = load_file(tmp_path / "out.safetensors")
    attention = "lora_te2_text_model_encoder_layers_1_self_attn"
    for projection in ("k_proj", "v_proj", "out_proj"):
        assert tensors[f"{attention}_{projection}.lora_down.weight"].equal(torch.zeros(1, 8))
        assert tensors[f"{attention}_{projection}.lora_up.weight"].equal(torch.zeros(8, 1))
    assert tensors[f"{attention}_q_proj.lora_up.weight"].any()
    loaded = pipeline(models)
    loaded.load_lora_weights(tmp_path, weight_name="out.safetensors")
    for name in layers:
        torch.testing.assert_close(outputs(getattr(loaded, name)), expected[name], **CLOSE)


@pytest.mark.parametrize("layer, mids", [(nn.Conv1d, 0), (nn.Conv2d, 1), (nn.Conv3d, 0)])
def test_only_lycoris_gets_a_mid_of_other_kernels_than_conv2d(layer, mids, tmp_path):
    """ComfyUI, A1111 and InvokeAI take lora_mid as (rank, rank, height, width)."""
    config = FloraConfig(r=2, target_modules=["layer"], init_weights=False)
    get_peft_model(Holder(layer(4, 6, 3)), config).save_pretrained(str(tmp_path / "flora"))
    for prefix, count in (("lora_unet", mids), ("lycoris", 1)):
        export_locon(tmp_path / "flora", tmp_path / f"{prefix}.safetensors", prefix=prefix)
        assert sum("lora_mid" in key for key in load_file(tmp_path / f"{prefix}.safetensors")) == count


@pytest.mark.parametrize("make, part", [(unet, "unet"), (transformer, "transformer")])
def test_one_model_of_diffusers_loads_its_adapter(make, part, tmp_path):
    model = make()
    expected = tuned(model, tmp_path / "flora")
    assert f"{part} of rank" in export_diffusers(tmp_path / "flora", tmp_path / "out")
    model.load_lora_adapter(tmp_path / "out", prefix=part, use_safetensors=True)
    torch.testing.assert_close(outputs(model), expected, **CLOSE)


@pytest.mark.parametrize("layer", ["q_proj", "fc1", "text_projection"])
def test_a_text_encoder_loads_whichever_layers_are_adapted(layer, tmp_path):
    models = components(xl=True)
    expected = tuned(models["text_encoder_2"], tmp_path / "flora", [layer])
    export_diffusers(tmp_path / "flora", tmp_path / "out", component="text_encoder_2")
    loaded = pipeline(models)
    loaded.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(outputs(loaded.text_encoder_2), expected, **CLOSE)
    assert "text_encoder of rank" in export_diffusers(tmp_path / "flora", tmp_path / "first")


def test_a_file_with_the_original_names_of_sdxl(tmp_path):
    """diffusers has its own map back from them."""
    models = components(xl=True)
    assert sgm_names(unet())["up_blocks.0.upsamplers.0.conv"] == "output_blocks.1.1.conv"
    expected = tuned(models["unet"], tmp_path / "flora")
    export_locon(tmp_path / "flora", tmp_path / "out" / "original.safetensors", folded=True)
    names = {name_of("lora_unet", name) for name in sgm_names(models["unet"]).values()}
    assert {key.partition(".")[0] for key in load_file(tmp_path / "out" / "original.safetensors")} <= names
    import_locon(tmp_path / "out" / "original.safetensors", models["unet"], tmp_path / "back")
    back = PeftModel.from_pretrained(copy.deepcopy(models["unet"]), str(tmp_path / "back"))
    torch.testing.assert_close(outputs(back), expected, **CLOSE)
    pipe = pipeline(models)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name="original.safetensors")
    torch.testing.assert_close(outputs(pipe.unet), expected, **CLOSE)
    models["unet"].save_pretrained(tmp_path / "base")
    found = verify(str(tmp_path / "base"), tmp_path / "flora", tmp_path / "out" / "original.safetensors", "locon")
    assert found.largest < 1e-4 * found.effect


@pytest.mark.parametrize("form", ["locon", "diffusers"])
def test_verification_finds_its_part_among_several(form, tmp_path):
    models = components(xl=False)
    for name, model in models.items():
        tuned(model, tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-base")
    export, out = {"locon": (export_locon, "l.safetensors"), "diffusers": (export_diffusers, "d")}[form]
    export(tmp_path / "unet", tmp_path / out, text_encoder=tmp_path / "text_encoder")
    for name in models if form == "locon" else ["unet"]:
        found = verify(str(tmp_path / f"{name}-base"), tmp_path / name, tmp_path / out, form)
        assert found.largest < 1e-4 * found.effect
    if form == "diffusers":
        with pytest.raises(ValueError, match="CLIPTextModel.*load_lora_adapter"):
            verify(str(tmp_path / "text_encoder-base"), tmp_path / "text_encoder", tmp_path / out, form)


@pytest.mark.parametrize("form", ["locon", "diffusers"])
def test_a_pipeline_is_verified_by_its_component_and_the_rest_is_named(form, tmp_path):
    models = components(xl=False)
    pipeline(models).save_pretrained(tmp_path / "pipeline")
    for name, model in models.items():
        tuned(model, tmp_path / name)
    out = tmp_path / {"locon": "out.safetensors", "diffusers": "out"}[form]
    rest = ["--text-encoder", tmp_path / "text_encoder", "--verify"]
    result = flora("export", form, tmp_path / "unet", out, *rest, tmp_path / "pipeline")
    assert result.exit_code == 0, result.output
    assert "verified: outputs differ" in result.stdout
    assert f"not verified: {tmp_path / 'text_encoder'}" in result.stdout
    lora = ["import", "lora", tmp_path / "lora", tmp_path / "back", "--verify", tmp_path / "pipeline"]
    assert_refused(flora(*lora), "is a pipeline", "text_encoder, ")
    assert not (tmp_path / "back").exists()


def test_the_export_says_which_loader_reads_it_and_that_one_does(tmp_path):
    model = unet()
    expected = tuned(model, tmp_path / "flora", ["conv_in"])
    for prefix, layers in ((None, 0), ("lycoris", 1)):
        file = tmp_path / f"{prefix}.safetensors"
        line = export_locon(tmp_path / "flora", file, prefix=prefix)
        named = (
            "LyCORIS alone needs --prefix lycoris" if prefix is None else "for LyCORIS (create_lycoris_from_weights)"
        )
        assert named in line and "2 weights" not in line
        merged = copy.deepcopy(model)
        network, _ = create_lycoris_from_weights(1.0, str(file), merged)
        assert len(network.loras) == layers
    network.merge_to()
    torch.testing.assert_close(outputs(merged), expected, **CLOSE)
    folded = export_locon(tmp_path / "flora", tmp_path / "folded.safetensors", folded=True)
    assert "also kohya's scripts" in folded and "need --folded" not in folded
    assert "told the prefix net" in export_locon(tmp_path / "flora", tmp_path / "n.safetensors", prefix="net")
