"""Where users come from: PEFT, transformers, diffusers, torch's own distribution and compilation."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import flora
from flora import FloraConfig, FloraLayer
from flora.tuner.names import COMPILERS_READ
from flora.tuner.peft_compat import SAVES_BIASES
from processes import START
from reference import layers

TOKENS = torch.arange(12).reshape(3, 4)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tied_llama() -> LlamaForCausalLM:
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def adapted(model, targets="all-linear", r=4, **options):
    torch.manual_seed(1)
    return get_peft_model(model, FloraConfig(r=r, target_modules=targets, init_weights=False, **options)).eval()


def test_a_second_adapter_may_use_a_shorthand_too():
    model = adapted(llama(), "all-linear")
    model.add_adapter("other", FloraConfig(r=2, target_modules="all-weights", exclude_modules=["embed_tokens"]))
    assert all(set(layer.tucker_space) == {"default", "other"} for layer in layers(model))


@pytest.mark.parametrize(("make", "targets"), [(llama, ["q_proj", "down_proj"]), (t5, ["q", "wo"])])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_mixed_adapters(make, targets, beams):
    model = adapted(make(), targets, scale=30.0)
    model.add_adapter("other", FloraConfig(r=4, target_modules=targets, init_weights=False, scale=30.0))
    tokens = TOKENS % 14 + 2
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    names = ["__base__", "default", "other"]
    mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
    for n, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=tokens[n : n + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=tokens[n : n + 1], **options)
        assert torch.equal(mixed[n], alone[0])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model.generate(input_ids=tokens, adapter_names=["absent"] * 3, **options)


@pytest.mark.parametrize("whole", [False, True], ids=["base model", "PeftModel"])
def test_adapter_names_of_a_compiled_model(whole):
    torch.compiler.reset()
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), ["0"], modules_to_save=["1"]), torch.randn(3, 6)
    model.add_adapter("other", FloraConfig(r=4, target_modules=["0"], init_weights=False, modules_to_save=["1"]))
    names = ["default", "other", "__base__"]
    mixes = [{}, {"adapter_names": names}, {"adapter_names": names[::-1]}, {}]
    with torch.no_grad():
        expected = [model(x, **mix) for mix in mixes]
        inner = model.base_model.model
        if whole:
            compiled = torch.compile(model, backend="eager")
        else:
            inner.compile(backend="eager")
            compiled = model
        if whole and not COMPILERS_READ:
            with pytest.raises(RuntimeError, match="set_stance in a torch.compile region"):
                compiled(x, adapter_names=names)
            return
        for mix, one in zip(mixes, expected, strict=True):
            torch.testing.assert_close(compiled(x, **mix), one)


def test_calls_with_names_in_threads_leave_compilers_as_they_were(monkeypatch):
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: Stance(stances, stance))
    model = adapted(nn.Sequential(nn.Linear(6, 6)), ["0"])
    entered, leave = Barrier(3), Barrier(3)

    def serve(names):
        with model.base_model._enable_peft_forward_hooks(adapter_names=names):
            entered.wait()
            leave.wait()

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(serve, ["default"]) for _ in range(2)]
        entered.wait()
        leave.wait()
        assert all(call.result() is None for call in calls)
    assert stances == ["force_eager", "force_eager", "the first's end"]


class Stance:
    """As torch's: it is taken when it is made."""

    def __init__(self, stances, stance):
        self.stances, self.first = stances, not stances
        stances.append(stance)

    def __exit__(self, *error):
        self.stances.append("the first's end" if self.first else "another's end")


def test_transformers_own_adapter_methods(tmp_path):
    model = llama()
    plain = model(TOKENS).logits
    model.add_adapter(FloraConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False), "mine")
    expected = model(TOKENS).logits
    assert not torch.allclose(expected, plain)
    model.disable_adapters()
    torch.testing.assert_close(model(TOKENS).logits, plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    fresh = llama()
    fresh.load_adapter(tmp_path, "yours")
    torch.testing.assert_close(fresh(TOKENS).logits, expected)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(TOKENS).logits, expected)


def test_injection_and_state_dicts():
    config = FloraConfig(r=2, target_modules=["q_proj"], init_weights=False)
    model = inject_adapter_in_model(config, llama())
    state = get_peft_model_state_dict(model)
    assert all(".tucker_space." in key and "default" not in key for key in state)
    other = inject_adapter_in_model(config, llama(), "other", state_dict=state)
    result = set_peft_model_state_dict(other, state, "other")
    assert not result.unexpected_keys
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)


def test_nothing_leaks_between_lora_and_flora(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="first")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(FloraConfig(target_modules=["v_proj"]), model.base_model.model, "second")
    assert not [key for key in get_peft_model_state_dict(model, adapter_name="first") if "tucker_" in key]


def test_mixed_model_beside_lora():
    torch.manual_seed(1)
    base = llama()
    plain = base(TOKENS).logits
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora, "first", mixed=True).eval()
    with_lora = model(TOKENS).logits
    model.add_adapter("second", FloraConfig(target_modules=["v_proj", "up_proj"], r=3, init_weights=False))
    model.set_adapter("second")
    with_flora = model(TOKENS).logits
    model.set_adapter(["first", "second"])
    both = model(TOKENS).logits
    for one, two in [(plain, with_lora), (plain, with_flora), (with_lora, both), (with_flora, both)]:
        assert not torch.allclose(one, two)
    with model.disable_adapter():
        torch.testing.assert_close(model(TOKENS).logits, plain)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, both, rtol=1e-4, atol=1e-5)
    assert not layers(merged)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.filterwarnings("ignore:.*lready .*merged:UserWarning")
@pytest.mark.parametrize("names", [["flora"], ["lora", "flora"], ["flora", "lora"]], ids="-".join)
def test_a_layer_with_two_names_keeps_both_in_a_mixed_model(names):
    options = {"r": 2, "target_modules": ["first"]}
    configs = {"flora": FloraConfig(**options, init_weights=False)}
    configs["lora"] = LoraConfig(**options, init_lora_weights=False)
    model = get_peft_model(Twice(), configs[names[0]], f"our_{names[0]}", mixed=True)
    for name in names[1:]:
        model.add_adapter(f"our_{name}", configs[name])
    model.set_adapter([f"our_{name}" for name in names])
    base, x = model.base_model.model, torch.randn(3, 4)
    assert base.first is base.second
    before = model(x)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear and merged.first is merged.second
    torch.testing.assert_close(merged(x), before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # older have no other
@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_autocast_and_checkpointing_give_the_same_gradients(execution):
    def gradients(checkpoint: bool, autocast: bool):
        model = adapted(llama(), execution=execution).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        return loss.item(), [p.grad for p in model.parameters() if p.requires_grad]

    loss, grads = gradients(checkpoint=False, autocast=False)
    again, checkpointed = gradients(checkpoint=True, autocast=False)
    assert again == pytest.approx(loss)
    for a, b in zip(grads, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    low, lows = gradients(checkpoint=False, autocast=True)
    assert low == pytest.approx(loss, rel=0.05) and all(g.dtype == torch.float32 for g in lows)


def test_low_precision_loses_no_small_update():
    """A bf16 weight of ones can't hold 1 + 1e-3; the factored update beside it can, and float32 cores learn it."""
    layer = nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    model = get_peft_model(nn.Sequential(layer), FloraConfig(r=1, target_modules=["0"], scale=1e-3, init_weights=False))
    space = layers(model)[0].tucker_space["default"]
    assert space.core.dtype == torch.float32
    for p in space.parameters():
        nn.init.ones_(p)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 1, -1  # the base output is zero, so nothing hides the update
    space.factors[1].data[1] = 0
    assert model(x)[0, 0].item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], "all-weights"])
def test_torch_s_transformer_layer_does_not_run_past_the_adapter(targets):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = adapted(nn.Sequential(encoder), targets)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        evaluated = model(x)
    trained = model.train()(x)
    torch.testing.assert_close(evaluated, trained)
    merged = model.eval().merge_and_unload()
    torch.testing.assert_close(merged(x), evaluated)


class Padded(nn.Module):
    """Evaluation turns a padded batch into nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)[~padding]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("targets", [["linear1"], ["layers.1.linear2"], ["self_attn"], "all-weights"])
def test_torch_s_transformer_encoder_takes_a_padding_mask(targets):
    torch.manual_seed(0)
    model = adapted(Padded(), targets)
    x, padding = torch.randn(3, 5, 8), torch.tensor([5, 2, 4])[:, None] <= torch.arange(5)
    with torch.no_grad():
        evaluated = model(x, padding)
    torch.testing.assert_close(evaluated, model.train()(x, padding))
    merged = model.eval().merge_and_unload()
    assert merged.encoder.use_nested_tensor
    torch.testing.assert_close(merged(x, padding), evaluated)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_tied_weights_may_be_tied_again(targets):
    model = adapted(tied_llama(), targets)
    expected, (layer,) = model(TOKENS).logits, layers(model)
    model.tie_weights()
    assert torch.equal(model(TOKENS).logits, expected)
    model.merge_adapter()
    model.tie_weights()
    torch.testing.assert_close(model(TOKENS).logits, expected)
    model.unmerge_adapter()
    inner = model.base_model.model
    assert layer.base_parameter is inner.get_parameter("model.embed_tokens.weight")
    assert torch.equal(model(TOKENS).logits, expected)
    with pytest.raises(ValueError, match=r"a weight of shape \[16, 8\] is needed, got \[3, 8\]"):
        layer.weight = nn.Parameter(torch.ones(3, 8))
    layer.weight = other = nn.Parameter(torch.ones(16, 8))
    assert layer.base_parameter is other


class Towers(nn.Module):
    def __init__(self, tower: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("vision", tower):
            setattr(self, name, nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Conv1d(8, 8, 1)}))
        self.tower = tower

    def forward(self, x):
        tower = getattr(self, self.tower)
        return tower["v"](tower["q"](self.vision["q"](x))[..., None])[..., 0]


@pytest.mark.parametrize("targets", ["all-weights", ["q"], ["model.q", "vision.q"]])
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "the model's own"])
def test_layers_that_were_renamed_since(targets, how, tmp_path):
    model, x = adapted(Towers("model"), targets, budget=200, r=None), torch.randn(2, 8)
    model.save_pretrained(tmp_path)
    base, mapping = Towers("language"), {r"^model\.": "language."}
    if how == "load_adapter":
        loaded = get_peft_model(base, FloraConfig(target_modules=["language.q"]))
        loaded.load_adapter(tmp_path, "other", key_mapping=mapping)
        loaded.set_adapter("other")
    elif how == "from_pretrained":
        loaded = PeftModel.from_pretrained(base, tmp_path, key_mapping=mapping)
    else:
        base._checkpoint_conversion_mapping = mapping
        loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded.eval()(x), model(x))
    with pytest.raises(ValueError, match=r"layer 'language\.q'|unexpected key 'model\.q"):
        PeftModel.from_pretrained(Towers("language"), tmp_path)


class Reader(nn.Module):
    """As Swin's and EVA's attention do: the parent reads the layer's weight and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)


def test_a_weight_that_is_only_read_is_adapted_too():
    model, x = adapted(nn.Sequential(Reader()), ["qkv"]), torch.randn(3, 6)
    with model.disable_adapter():
        plain = model(x)
    result = model(x)
    assert not torch.allclose(result, plain)
    result.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), result)
    model.merge_adapter()
    torch.testing.assert_close(model(x), result)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="layer '0.qkv': its weight is read, not called: `adapter_names`"):
        model.eval()(x, adapter_names=["default", "__base__", "default"])


def test_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    def unet():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip

    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8)
    model = unet()
    plain = model(*inputs).sample
    model.add_adapter(FloraConfig(r=2, target_modules=["conv1", "conv2", "to_q", "conv"], init_weights=False), "style")
    styled = model(*inputs).sample
    model.set_adapters(["style"], [0.0])
    torch.testing.assert_close(model(*inputs).sample, plain)
    model.set_adapters(["style"], [1.0])
    torch.testing.assert_close(model(*inputs).sample, styled)
    model.disable_adapters()
    torch.testing.assert_close(model(*inputs).sample, plain)
    state = get_peft_model_state_dict(model, adapter_name="style")
    fresh = unet()
    fresh.add_adapter(model.peft_config["style"], "style")
    set_peft_model_state_dict(fresh, state, "style")
    torch.testing.assert_close(fresh(*inputs).sample, styled)

    with pytest.raises(ValueError, match="'style' is a FLORA adapter, and this file is for LoRA. Save it with peft"):
        model.save_lora_adapter(tmp_path, "style")
    with pytest.raises(ValueError, match="tucker_space.core' is a FLORA adapter"):
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    assert not list(tmp_path.iterdir())
    fresh = unet()
    fresh.add_adapter(LoraConfig(target_modules=["to_q"]), "lora")
    fresh.save_lora_adapter(tmp_path, "lora")
    assert list(tmp_path.iterdir())


def test_the_model_card_says_how_to_load_the_adapter(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert card.text.count("\nimport flora\n") == 1 and card.data.library_name == "peft"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_bias_modules_to_save_and_token_indices_travel(tmp_path):
    model = get_peft_model(
        llama(),
        FloraConfig(
            target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[3], init_weights=False
        ),
    ).eval()
    model.base_model.model.model.norm.modules_to_save["default"].weight.data += 1
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path).eval()(TOKENS).logits, expected)


@pytest.mark.parametrize("bias", ["all", "flora_only"])
def test_biases_train_and_travel(bias, tmp_path):
    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # noqa: E731
    config = FloraConfig(target_modules=["0"], bias=bias)
    if not SAVES_BIASES:
        with pytest.raises(ValueError, match="needs PEFT 0.21 or later"):
            get_peft_model(make(), config)
        return
    model = get_peft_model(make(), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(trained) == (2 if bias == "all" else 1)
    layers(model)[0].base_layer.bias.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(layers(loaded)[0].base_layer.bias, layers(model)[0].base_layer.bias)


def test_the_base_layer_s_attributes_show_through():
    model = adapted(nn.Sequential(nn.Conv2d(3, 6, 3), nn.MultiheadAttention(8, 2)), ["0", "1"])
    conv, attention = model.base_model.model[0], model.base_model.model[1]
    assert conv.kernel_size == (3, 3) and conv.weight.shape == (6, 3, 3, 3) and attention.embed_dim == 8
    with pytest.raises(AttributeError):
        _ = conv.no_such_thing
    assert isinstance(copy.deepcopy(conv), FloraLayer)


def _train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


def _train_sharded(rank: int, folder: Path) -> None:
    """One process of two, each with the same batch: as if alone. Rank 0 writes what each way of sharding trained."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for how in ("ddp", "fsdp2"):
        model = adapted(llama()).train()
        if how == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            for block in model.base_model.model.model.layers:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        _train(wrapped)
        state = {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        if rank == 0:
            torch.save(state, folder / f"{how}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.start_processes(_train_sharded, (folder,), nprocs=2, start_method=START)
    return folder


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(how, sharded):
    state = torch.load(sharded / f"{how}.pt", weights_only=True)
    model = adapted(llama()).train()
    _train(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(state[name], p.detach())


def test_a_hot_swap_does_not_recompile(tmp_path):
    torch.compiler.reset()
    adapted(llama(), r=2).save_pretrained(tmp_path)
    model = adapted(llama())
    expected = PeftModel.from_pretrained(llama(), tmp_path).eval()(TOKENS).logits
    compiled = torch.compile(model.base_model.model, backend="eager")
    with torch.no_grad():
        compiled(TOKENS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            flora.hotswap(model, tmp_path)
            torch.testing.assert_close(compiled(TOKENS).logits, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 3]},
    ],
)
def test_a_hot_swap_takes_what_a_file_may_hold(fields, tmp_path):
    fields = {"target_modules": ["q_proj"], "init_weights": False, **fields}
    model = get_peft_model(llama(), FloraConfig(r=2, **fields)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers="embed_tokens" in fields["target_modules"])
    other = get_peft_model(llama(), FloraConfig(r=4, **fields)).eval()
    other.add_adapter("second", FloraConfig(r=4, **fields))
    flora.hotswap(torch.compile(other, backend="eager"), tmp_path)
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)


def test_peft_s_own_conversion_to_lora_of_linear_layers():
    from peft import convert_to_lora

    model = adapted(llama(), "all-linear")
    expected = model(TOKENS).logits
    config, state = convert_to_lora(model, rank=4)
    converted = get_peft_model(model.unload(), config).eval()
    set_peft_model_state_dict(converted, state)
    torch.testing.assert_close(converted(TOKENS).logits, expected)
