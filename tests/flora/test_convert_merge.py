"""Merged models: what is written loads into the same model as a merge in memory gives."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import CASES
from flora import FloraConfig
from flora.convert.adapter import Adapter
from flora.convert.checkpoint import Checkpoint, MissingWeight
from flora.convert.merging import merge
from flora.tuner.peft_compat import SAVES_BIASES
from reference import first, ulps
from test_contract import Holder
from test_contract import build as build_layer

# PEFT's own words on adapted embeddings, and 0.20's on models that come from no folder
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{words}:UserWarning")
    for words in (
        "save_embedding_layers",
        "tie_word_embeddings",
        "tied_target_modules",
        "no longer tied",
        "config file",
    )
]
BIASES = {"bias": "all"} if SAVES_BIASES else {}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 50}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(12).view(2, 6)}


def image(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(shape, dtype=torch.float64)}


def bert(**options):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **options))


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **options))


def mixtral():
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def vit():
    config = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=8, patch_size=4))


def convnext():
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
    return transformers.ConvNextV2ForImageClassification(config)


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def latents() -> dict[str, Tensor]:
    sample, context = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 3, 8).double()
    return {"sample": sample, "timestep": torch.tensor(3), "encoder_hidden_states": context}


@dataclass(frozen=True)
class Model:
    """``saved``: the part that is saved as the base model. ``config``: of the adapter."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    config: dict = field(default_factory=lambda: {"target_modules": "all-linear"})
    saved: Callable[[nn.Module], nn.Module] = lambda model: model


MODELS = [
    Model("bert", bert, tokens),
    Model("bert-headless", bert, tokens, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, lambda m: m.bert),
    Model("bert-biases", bert, tokens, {"target_modules": ["query", "classifier"], **BIASES}),
    Model("llama-untied", llama, tokens, {"target_modules": ["q_proj", "embed_tokens"]}),
    Model("llama-tied", lambda: llama(tie_word_embeddings=True), tokens),
    Model("mixtral", mixtral, tokens, {"target_parameters": ["gate_up_proj", "experts.down_proj", "gate.weight"]}),
    Model("vit", vit, image(1, 3, 8, 8), {"target_modules": "all-weights", "modules_to_save": ["classifier"]}),
    Model("convnext", convnext, image(1, 3, 8, 8), {"target_modules": "all-weights"}),
    Model("unet", unet, latents, {"target_modules": "all-weights"}),
]  # fmt: skip
every_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)


def trained(model: nn.Module, folder: Path, **config) -> PeftModel:
    """With an adapter that does something, which is saved as ``folder``; what it trains whole has changed, too."""
    adapted = get_peft_model(model, FloraConfig(**{"r": 3, "init_weights": False, **config})).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "tucker_space" not in name:
            parameter.data += torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return adapted


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    if hasattr(model, "set_experts_implementation"):  # the default one knows no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def build(case: Model, folder: Path, dtype=torch.float64) -> PeftModel:
    torch.manual_seed(0)
    model = case.make().to(dtype)
    case.saved(model).save_pretrained(str(folder / "base"))
    return trained(model, folder / "adapter", **case.config)


def loaded(like: nn.Module, folder: Path, dtype=torch.float64) -> nn.Module:
    option = {"torch_dtype" if "diffusers" in type(like).__module__ else "dtype": dtype}
    return type(like).from_pretrained(str(folder), **option)


def contents(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


@every_model
def test_what_is_written_is_the_model_merged_in_memory(case, tmp_path):
    adapted, inputs = build(case, tmp_path), case.inputs()
    expected = run(adapted, inputs)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(run(loaded(adapted.base_model.model, tmp_path / "out"), inputs), expected, **CLOSE)
    assert len(report.merged) == len(Adapter.open(tmp_path / "adapter").sites)
    assert not report.lost and report.lost_in_all is None
    assert json.loads(json.dumps(report.to_dict()))["out"] == str(tmp_path / "out")


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_and_what_is_lost_is_told(case, dtype, tmp_path):
    adapted = build(case, tmp_path, dtype)
    before = contents(tmp_path / "base")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(str(tmp_path / "memory"))
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "memory")
    assert before.keys() <= ours.keys()
    for key, tensor in ours.items():
        other = theirs[key] if key in theirs else theirs[f"{merged.base_model_prefix}.{key}"]
        assert tensor.dtype == dtype
        assert ulps(tensor, other).max() <= 1  # which way a tie rounds is up to the kernel
    assert set(report.lost) == set(report.merged)
    assert all(0 < lost < 0.5 for lost in report.lost.values()) and 0 < report.lost_in_all < 0.5
    assert f"{report.lost_in_all:.2%}" in str(report)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_kind_of_weight(case, tmp_path):
    model, base, args = build_layer(case)
    model.save_pretrained(str(tmp_path / "adapter"))
    save_file(Holder(base).state_dict(), tmp_path / "base.safetensors")
    report = merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    assert report.files == ["out.safetensors"]
    merged = Holder(copy.deepcopy(base))
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(first(merged(*args)), first(model(*args)), **CLOSE)


# --------------------------------------------------------------------------------------------------------- layouts


def torch_file(folder: Path, name: str, **around) -> Path:
    """The folder's safetensors as a torch file, in its place."""
    content = contents(folder)
    torch.save({"state_dict": content, **around} if around else content, folder / name)
    (folder / "model.safetensors").unlink()
    return folder / name


def sharded_bin(folder: Path) -> None:
    content = contents(folder)
    (folder / "model.safetensors").unlink()
    names = {key: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, key in enumerate(content)}
    for name in set(names.values()):
        torch.save({key: content[key] for key in names if names[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


LAYOUTS = {
    "bin": lambda folder: torch_file(folder, "pytorch_model.bin"),
    "training-file": lambda folder: torch_file(folder, "best.pth", epoch=3),
    "sharded-bin": sharded_bin,
    "variant": lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_base_becomes_safetensors(layout, tmp_path):
    adapted = build(MODELS[0], tmp_path)
    LAYOUTS[layout](tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    expected = run(adapted, tokens())
    torch.testing.assert_close(run(loaded(adapted.base_model.model, tmp_path / "out"), tokens()), expected, **CLOSE)


@pytest.mark.parametrize("case", [MODELS[0], MODELS[5], MODELS[-1]], ids=lambda case: case.id)
def test_shards_in_and_out(case, tmp_path):
    adapted, inputs = build(case, tmp_path), case.inputs()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "shards", max_shard_size="20KB")
    stem = "diffusion_pytorch_model" if case.id == "unet" else "model"
    assert (tmp_path / "whole" / f"{stem}.safetensors").is_file()
    index = json.loads((tmp_path / "shards" / f"{stem}.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole, shards = contents(tmp_path / "whole"), contents(tmp_path / "shards")
    assert whole.keys() == shards.keys() and all(torch.equal(whole[key], shards[key]) for key in whole)
    expected = run(adapted, inputs)
    torch.testing.assert_close(run(loaded(adapted.base_model.model, tmp_path / "shards"), inputs), expected, **CLOSE)
    # and the shards as a base
    merge(tmp_path / "shards", tmp_path / "adapter", tmp_path / "twice")
    merge(tmp_path / "whole", tmp_path / "adapter", tmp_path / "twice-whole")
    twice, again = contents(tmp_path / "twice"), contents(tmp_path / "twice-whole")
    assert all(torch.equal(twice[key], again[key]) for key in again)


def test_other_files_come_along_and_weights_do_not(tmp_path):
    build(MODELS[0], tmp_path)
    base = tmp_path / "base"
    kept = ["tokenizer.json", "chat/template.jinja", "modules.json", "2_Dense/model.safetensors"]
    left = [
        "tf_model.h5", "optimizer.pt", "training_args.bin", ".cache/x", ".git", "onnx/model.onnx",
        "checkpoint-5/model.safetensors", "checkpoint-5/config.json", "adapter_config.json", "model.bin.index.json",
    ]  # fmt: skip
    for name in kept + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text('[{"path": "2_Dense"}]')
    merge(base, tmp_path / "adapter", tmp_path / "out")
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(["config.json", "model.safetensors", *kept])


def test_a_single_file_becomes_a_file_or_a_folder_of_it(tmp_path):
    build(MODELS[0], tmp_path)
    base = tmp_path / "base" / "model.safetensors"
    merge(base, tmp_path / "adapter", tmp_path / "out.safetensors")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    one, other = load_file(tmp_path / "out.safetensors"), contents(tmp_path / "out")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------------------------- heads and tied weights


def test_a_head_of_another_shape_is_written_and_told(tmp_path):
    bert(num_labels=2).double().save_pretrained(str(tmp_path / "base"))
    model = transformers.BertForSequenceClassification.from_pretrained(
        str(tmp_path / "base"), num_labels=5, ignore_mismatched_sizes=True, dtype=torch.float64
    )
    expected = run(trained(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS"), tokens())
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.new == {"classifier.bias": [5], "classifier.weight": [5, 16]}
    assert "classifier.weight [5, 16]" in str(report)
    merged = type(model).from_pretrained(str(tmp_path / "out"), num_labels=5, dtype=torch.float64)
    torch.testing.assert_close(run(merged, tokens()), expected, **CLOSE)


TIED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "trained-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both-trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("adapted", TIED)
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_tied_weight_becomes_two_where_one_is_adapted(adapted, layout, tmp_path):
    model = llama(tie_word_embeddings=True).double()
    model.save_pretrained(str(tmp_path / "base"))
    if layout == "bin":  # both names, one storage
        torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
        (tmp_path / "base" / "model.safetensors").unlink()
    expected = run(trained(model, tmp_path / "adapter", **TIED[adapted]), tokens())
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(report.untied) == ["lm_head.weight", "model.embed_tokens.weight"] and "no longer tied" in str(report)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    torch.testing.assert_close(run(loaded(model, tmp_path / "out"), tokens()), expected, **CLOSE)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_tied_weight_that_nobody_adapts_stays_tied(layout, tmp_path):
    model = llama(tie_word_embeddings=True).double()
    model.save_pretrained(str(tmp_path / "base"))
    if layout == "bin":
        torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
        (tmp_path / "base" / "model.safetensors").unlink()
    trained(model, tmp_path / "adapter", target_modules=["q_proj"])
    assert not merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").untied
    merged = loaded(model, tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_vocabulary_that_grew(tmp_path):
    model = llama(tie_word_embeddings=True).double()
    model.save_pretrained(str(tmp_path / "base"))
    model.resize_token_embeddings(53)
    expected = run(trained(model, tmp_path / "adapter", target_modules=["embed_tokens"]), tokens())
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.new == {"model.embed_tokens.weight": [53, 16], "lm_head.weight": [53, 16]}
    merged = type(model).from_pretrained(str(tmp_path / "out"), vocab_size=53, dtype=torch.float64)
    torch.testing.assert_close(run(merged, tokens()), expected, **CLOSE)


def test_what_can_not_be_untied_is_refused(tmp_path):
    config = transformers.T5Config(d_model=16, num_layers=1, d_ff=20, d_kv=8, num_heads=2, vocab_size=50)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(str(tmp_path / "base"))
    trained(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="tied weight"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- what is wrong


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = next(folder.glob("*.safetensors"))
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def one_key_away(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    content = load_file(path)
    content.popitem()
    save_file(content, path)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(nn.Linear(2, 2), folder / "pytorch_model.bin")


def shards_of(folder: Path) -> Path:
    model = transformers.BertForSequenceClassification.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder), max_shard_size="5KB")
    return folder


QUERY = "bert.encoder.layer.0.attention.self.query"
SPOILT = {
    "no-folder": (lambda base, adapter: shutil.rmtree(base), "no such file or folder"),
    "no-weights": (lambda base, adapter: (base / "model.safetensors").unlink(), "no weights of a model"),
    "adapter-as-base": (lambda base, adapter: (shutil.rmtree(base), shutil.copytree(adapter, base)), "an adapter's"),
    "cut-off": (lambda base, adapter: shorten(base / "model.safetensors"), "not a whole safetensors file"),
    "missing-shard": (lambda base, adapter: sorted(shards_of(base).glob("*.safetensors"))[1].unlink(), "are missing"),
    "cut-off-shard": (lambda base, adapter: shorten(sorted(shards_of(base).glob("*.safetensors"))[1]), "-00002-of-"),
    "shard-lacks-key": (lambda base, adapter: one_key_away(shards_of(base)), "although the index lists it"),
    "broken-index": (
        lambda base, adapter: (shards_of(base) / "model.safetensors.index.json").write_text("[]"), "JSON object",
    ),
    "code": (lambda base, adapter: pickled(base), "holds more than tensors"),
    "cut-off-bin": (lambda base, adapter: shorten(torch_file(base, "pytorch_model.bin")), "not a whole torch file"),
    "wrong-shape": (
        lambda base, adapter: rewrite(base, lambda t: t | {f"{QUERY}.weight": torch.ones(8, 16)}),
        r"(?s)attention.self.query'.*\[16, 16\].*query.weight.*\[8, 16\]",
    ),
    "wrong-base": (
        lambda base, adapter: rewrite(base, lambda t: {k.replace("query", "q_proj"): v for k, v in t.items()}),
        "no weight 'bert.encoder.layer.0.attention.self.query.weight'; the nearest: bert.encoder",
    ),
    "two-fit": (
        lambda base, adapter: rewrite(
            base, lambda t: {f"{side}.{k}": v.clone() for k, v in t.items() for side in ("left", "right")}
        ),
        "may be any of left.bert",
    ),
    "quantized": (
        lambda base, adapter: rewrite(base, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
        "float8_e4m3fn: a quantized",
    ),
    "adapter-not-finite": (
        lambda base, adapter: rewrite(adapter, lambda t: {k: v * float("nan") for k, v in t.items()}),
        "layer 'bert.*not finite",
    ),
    "sum-not-finite": (
        lambda base, adapter: rewrite(base, lambda t: {k: v * float("inf") for k, v in t.items()}), "is not finite in",
    ),
    "config": (lambda base, adapter: (base / "config.json").write_text("{"), "config.json is not a whole JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_named_and_nothing_is_written(name, tmp_path):
    build(MODELS[0], tmp_path, torch.float32)
    spoil, message = SPOILT[name]
    spoil(tmp_path / "base", tmp_path / "adapter")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_exists_is_left_alone(tmp_path):
    build(MODELS[0], tmp_path)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out.safetensors").touch()
    for name in ("base", "out", "out.safetensors"):
        with pytest.raises(FileExistsError, match="exists already"):
            merge(tmp_path / "base", tmp_path / "adapter", tmp_path / name)


@pytest.mark.parametrize("size", ["5 apples", 0, -3])
def test_a_shard_size_that_is_none(size, tmp_path):
    build(MODELS[0], tmp_path)
    with pytest.raises(ValueError, match="max_shard_size"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_a_tie_that_only_the_file_shows_is_refused(tmp_path):
    model = Holder(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model.layer[1].weight = model.layer[0].weight
    torch.save(model.state_dict(), tmp_path / "base.pth")
    trained(model, tmp_path / "adapter", target_modules=["layer.0"])
    with pytest.raises(ValueError, match=r"layer.0.weight and layer.1.weight are one tied weight"):
        merge(tmp_path / "base.pth", tmp_path / "adapter", tmp_path / "out")


def test_single_token_rows_are_refused(tmp_path):
    model = llama()
    model.save_pretrained(str(tmp_path / "base"))
    trained(model, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 4])
    with pytest.raises(ValueError, match="single rows"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------- the checkpoint


def test_a_checkpoint_tells_shapes_before_it_reads(tmp_path):
    model = bert()
    model.save_pretrained(str(tmp_path), max_shard_size="5KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.keys()) == set(model.state_dict()) and len(set(checkpoint.files.values())) > 2
    for key, tensor in model.state_dict().items():
        assert checkpoint.shape(key) == tensor.shape and checkpoint.dtype(key) == tensor.dtype
        assert torch.equal(checkpoint.tensor(key), tensor)
    with pytest.raises(ValueError, match="has no weight 'classifier.wait'; the nearest: classifier.weight"):
        checkpoint.tensor("classifier.wait")


def test_names_in_the_model_are_found_on_disk(tmp_path):
    mixtral().save_pretrained(str(tmp_path / "mixtral"))
    vit().save_pretrained(str(tmp_path / "vit"))
    on_disk = "vit.encoder.layer.1.attention.attention.query.weight"
    for name in ("vit.layers.1.attention.q_proj", "layers.1.attention.q_proj", on_disk.removesuffix(".weight")):
        assert Checkpoint.open(tmp_path / "vit").find(name) == on_disk
    stacks = Checkpoint.open(tmp_path / "mixtral")
    assert stacks.find("model.layers.0.mlp.gate") == "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(MissingWeight, match="merge_and_unload"):
        stacks.find("model.layers.0.mlp.experts", "gate_up_proj")
    stack = torch.randn(3, 40, 16)
    pieces = stacks.pieces("model.layers.0.mlp.experts", "gate_up_proj", stack)
    prefix = "model.layers.0.block_sparse_moe.experts.2"
    assert len(pieces) == 6 and torch.equal(pieces[f"{prefix}.w1.weight"], stack[2, :20])
    assert torch.equal(pieces[f"{prefix}.w3.weight"], stack[2, 20:])
    with pytest.raises(ValueError, match=r"w1.weight', of shape \[20, 15\].*merge_and_unload"):
        stacks.pieces("model.layers.0.mlp.experts", "gate_up_proj", stack[..., :15])


def test_a_name_on_the_hub(monkeypatch, tmp_path):
    adapted = build(MODELS[0], tmp_path)
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, set(allow_patterns)))
        return str(tmp_path / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    merge("someone/some-model", tmp_path / "adapter", tmp_path / "out")
    expected = run(adapted, tokens())
    torch.testing.assert_close(run(loaded(adapted.base_model.model, tmp_path / "out"), tokens()), expected, **CLOSE)
    assert "*.safetensors" in asked[-1][2] and not any("*.bin" in patterns for *_, patterns in asked)
    # of a whole pipeline no weights are fetched
    asked.clear()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it is a pipeline's"):
        Checkpoint.open("someone/some-model", revision="main")
    assert [(revision, "*.safetensors" in patterns) for _, revision, patterns in asked] == [("main", False)]


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'someone/some-model' is not a file or folder here"):
        Checkpoint.open("someone/some-model")
