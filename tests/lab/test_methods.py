"""The methods of a comparison: what they adapt, at which size, and that a Trainer can train and keep them."""

from __future__ import annotations

import copy
import re
from functools import cache

import peft
import pytest
import torch
from peft.tuners.lora import corda
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from flora_lab.methods import METHODS, adapt, adapters, common
from flora_lab.methods.common import CannotAdapt, head_parameters, trainable
from flora_lab.tasks.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks for it

HEADS = {"bert": ["classifier"], "vit": ["classifier"], "convnext": ["classifier"], "resnet": ["linear"]}
SIZED = [way for way in METHODS if METHODS[way].size]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
NOT_ON_CONVNEXT = ("houlsby", "pfeiffer", "gralora", "oft")
LINEAR_ONLY = (*NOT_ON_CONVNEXT, "pissa", "olora", "orthogonal", "eva", "lora_ga", "corda", "miss")
MOVING = ("pissa", "olora")  # they start with a part of the base weight, up to rounding
STEPS = {"orthogonal": 2, "gralora": 2, "oft": 2}  # ranks are multiples
CASES = [
    (way, name)
    for way in METHODS
    for name in ("bert", "convnext", "resnet")
    if way not in {"bert": (), "convnext": NOT_ON_CONVNEXT, "resnet": LINEAR_ONLY}[name]
]


@cache
def base(name):
    torch.manual_seed(1)
    if name == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=12, **SMALL))
    if name == "vit":
        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL))
    if name == "convnext":
        return ConvNextV2ForImageClassification(ConvNextV2Config(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2))
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, num_labels=3))


def model_of(name):
    return copy.deepcopy(base(name)).eval()


def batch_of(name):
    if name == "bert":
        return {"input_ids": torch.arange(24).reshape(4, 6), "labels": torch.arange(4) % 2}
    side = 32 if name == "convnext" else 8
    return {"pixel_values": torch.linspace(-2, 2, 4 * 3 * side**2).sin().reshape(4, 3, side, side),
            "labels": torch.arange(4) % 2}  # fmt: skip


def adapted(way, name, budget=4000, steps=8, **options):
    torch.manual_seed(0)
    return adapt(way, model_of(name), HEADS[name], budget, options, steps=steps)


def size_of(result, name):
    counted = trainable(result.model) - head_parameters(base(name), HEADS[name])
    assert result.parameters == counted or result.callbacks  # AdaLoRA starts with more than it ends with
    return result.parameters


def selection(*layers, parameters=None):
    return common.Selection({str(n): layer for n, layer in enumerate(layers)}, parameters or {}, [])


def fixed(result, way):
    """The option that a note says was solved for."""
    words = {"houlsby": r"width (\d+)", "pfeiffer": r"width (\d+)", "adalora": r"cut to (\d+)", "oft": r"size (\d+)"}
    return int(re.search(words.get(way, r"rank (\d+)"), result.notes[0])[1])


def train(model, folder, steps, callbacks=(), resume=None, optimizer=None):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, seed=0,
        use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    whole = batch_of("bert")
    rows = [{key: value[n] for key, value in whole.items()} for n in range(4)]
    optimizers = (optimizer(arguments) if optimizer else None, None)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ------------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize(("way", "name"), CASES)
def test_a_fresh_adapter_changes_no_output_and_only_it_and_the_head_are_trained(way, name):
    before, model, batch = model_of(name), model_of(name), batch_of(name)
    own = dict(model.named_parameters())
    torch.manual_seed(0)
    model = adapt(way, model, HEADS[name], 4000, {}).model.eval()
    assert torch.allclose(model(**batch).logits, before(**batch).logits, atol=1e-5 if way in MOVING else 1e-6)
    model.train()(**batch)["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    head = {key for key in own if key.split(".")[0] in HEADS[name]}
    kept = {"full": set(own), "bitfit": {key for key in own if key.endswith("bias")} | head}
    trained = {key for key, parameter in own.items() if parameter.requires_grad}
    assert trained == (set() if isinstance(model, peft.PeftModel) else kept.get(way, head))
    if isinstance(model, peft.PeftModel):  # it trains a copy of the head, within
        assert sum("modules_to_save" in key for key, p in model.named_parameters() if p.requires_grad) == len(head)


@pytest.mark.parametrize(("way", "name"), [case for case in CASES if case[0] in SIZED])
def test_the_size_is_the_nearest_to_the_budget(way, name):
    budget = 500 if way in ("houlsby", "pfeiffer") else 2000
    result = adapted(way, name, budget)
    size = size_of(result, name)
    assert 0 < size <= (1 if way in ("flora", "lokr") else 1.25) * budget
    if way == "flora":  # its ranks differ from layer to layer
        return
    rank, options = fixed(result, way), {}
    if way == "lokr":
        options["decompose_factor"] = int(re.search(r"factor (-?\d+)", result.notes[0])[1])
    step, full = STEPS.get(way, 1), "(full)" in result.notes[0]
    others = [rank - step] * (rank > step) + [rank + step] * (not full)
    sizes = [size_of(adapted(way, name, budget=0, **{METHODS[way].size: r}, **options), name) for r in others]
    if way == "lokr":  # the highest within the budget, whose matrices can be whole
        assert sizes[-1] > budget or sizes[-1] == size
    else:
        assert all(abs(size - budget) <= abs(other - budget) for other in sizes)


# of the largest layer: 16 wide, 24 in the middle; 32 channels, 64 x 9 for a matrix of the kernels
FULL = {"houlsby": 16, "pfeiffer": 16, "oft": 24, "lora_ga": 8} | dict.fromkeys(
    "lora dora adalora loha locon rslora loraplus pissa olora orthogonal eva corda hira gralora miss".split(), 16
)
FULL_OF_KERNELS = dict.fromkeys("lora dora adalora loha locon rslora loraplus hira".split(), 64)


@pytest.mark.parametrize(
    ("way", "name", "full"),
    [(way, "bert", full) for way, full in FULL.items()] + [(way, "resnet", r) for way, r in FULL_OF_KERNELS.items()],
)
def test_no_budget_takes_more_than_the_full_rank(way, name, full):
    result = adapted(way, name, budget=10**9)
    assert fixed(result, way) == full and f"{full} (full) " in result.notes[0]


def test_the_full_rank_counts_kernels_as_the_method_does():
    wide, narrow = nn.Conv2d(64, 3, 3), nn.Conv2d(3, 64, 3)
    experts = {"stack": nn.Parameter(torch.zeros(9, 4, 6))}
    assert selection(wide).full_rank() == 3 and selection(wide).full_rank(modes=(0, 1)) == 27
    assert selection(narrow).full_rank() == 27
    assert selection(nn.MultiheadAttention(8, 2), nn.Linear(2, 9)).full_rank() == 8
    assert selection(parameters=experts).full_rank() == 4


@pytest.mark.parametrize("way", SIZED)
def test_a_budget_too_small_and_an_unknown_option_are_refused(way):
    name = "bert"
    with pytest.raises(CannotAdapt, match=rf"{STEPS.get(way, 1)} has [\d,]+ parameters, above the budget of 3$"):
        adapted(way, name, budget=3)
    with pytest.raises(ValueError, match=f"{METHODS[way].size} must be a whole number from 1.*, got 0"):
        adapted(way, name, **{METHODS[way].size: 0})
    with pytest.raises((TypeError, ValueError), match="no_such_field"):
        adapted(way, name, no_such_field=1)


@pytest.mark.parametrize("way", METHODS)
def test_copies_and_files_hold_everything(way, tmp_path):
    """Equal seeds give equal adapters; a copy is one of its own; no two names share a tensor."""
    one, two = adapted(way, "bert").model, adapted(way, "bert").model
    state = one.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in two.state_dict().items())
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_file({key: tensor.contiguous() for key, tensor in one.state_dict().items()}, tmp_path / "model.safetensors")
    two.load_state_dict(load_file(tmp_path / "model.safetensors"))
    copied, batch = copy.deepcopy(one), batch_of("bert")
    with torch.no_grad():
        outputs = [model.eval()(**batch).logits for model in (one, two, copied)]
        for parameter in one.parameters():
            parameter.zero_()
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        assert torch.equal(copied(**batch).logits, outputs[0])


def test_what_is_left_out_is_said():
    for way in ("lora", "dora", "adalora"):
        (note,) = adapted(way, "convnext").notes[1:]
        assert note.startswith("left out, Conv2d with groups other than 1: ") and note.count("dwconv") == 2
    for way in ("loha", "lokr", "locon"):
        assert len(adapted(way, "convnext").notes) == 1
        assert adapted(way, "bert").notes[1] == (
            "left out, Embedding: bert.embeddings.word_embeddings, bert.embeddings.position_embeddings, "
            "bert.embeddings.token_type_embeddings"
        )
    with pytest.raises(CannotAdapt, match="at least two steps, and the training has 1"):
        adapted("adalora", "bert", steps=1)
    for way in ("houlsby", "pfeiffer"):
        with pytest.raises(CannotAdapt, match="no transformer blocks"):
            adapted(way, "resnet")
    for way in ("gralora", "oft"):
        with pytest.raises(CannotAdapt, match=r"fails on linear layers that follow convolutions, as in ConvNeXt$"):
            adapted(way, "convnext")
    with pytest.raises(CannotAdapt, match="needs widths that gralora_k=2 divides: 0$"):
        adapt("gralora", nn.Sequential(nn.Linear(4, 3)), [], 100, {})
    for way in ("pissa", "olora", "orthogonal", "eva", "lora_ga", "corda", "miss"):
        with pytest.raises(CannotAdapt, match=r"not support any of the 7 targets: Conv2d$"):
            adapted(way, "resnet")
    with pytest.raises(CannotAdapt, match=r"not support any of the 1 targets: Embedding$"):
        adapt("loha", model_of("bert"), [], 4000, {}, target_modules=["word_embeddings"])
    with pytest.raises(CannotAdapt, match="no bias outside the head"):
        adapt("bitfit", nn.Sequential(nn.Linear(2, 2, bias=False)), [], 1, {})
    with pytest.raises(CannotAdapt, match="no head"):
        adapt("head", model_of("bert"), [], 1, {})


def test_a_rank_pattern_may_fix_every_rank():
    model = adapted("lora", "resnet", r=1, rank_pattern={".*": 2}).model
    assert trainable(adapted("lora", "resnet", rank_pattern={".*": 2}).model) == trainable(model)


def test_starts_that_peft_has_for_linear_layers_leave_out_the_others():
    model, batch = adapted("lora", "convnext", init_lora_weights="pissa"), batch_of("convnext")
    assert model.notes[0].endswith("on 4 layers") and model.notes[1].startswith("left out, Conv2d: ")
    assert torch.allclose(model.model.eval()(**batch).logits, model_of("convnext")(**batch).logits, atol=1e-5)


def test_names_are_held_against_the_model():
    for wrong, message in [
        (("sgd", model_of("bert"), ["classifier"], 10), "method 'sgd'"),
        (("lora", model_of("bert"), ["clasifier"], 10), "head 'clasifier'"),
        (("lora", model_of("bert"), ["classifier"], 0), "budget must be a whole number from 1, got 0"),
        (
            ("lora", nn.ModuleDict({"fc": nn.Linear(2, 2), "to_fc": nn.Linear(2, 2)}), ["fc"], 10),
            "'to_fc' too",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            adapt(*wrong, {})
    with pytest.raises(ValueError, match="^budget: every method of a job has the job's own"):
        adapt("flora", model_of("bert"), [], 4000, {"budget": 300})
    with pytest.raises(ValueError, match="nowhere"):
        adapt("lora", model_of("bert"), [], 4000, {}, target_modules=["nowhere"])


LAYERS = {
    "grouped": nn.Conv2d(4, 4, 3, groups=2),
    "dilated": nn.Conv2d(4, 4, 3, dilation=2),
    "reflected": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 4, 3),
    "plain": nn.Conv2d(4, 4, 3),
}


@pytest.mark.parametrize("way", ["lora", "dora", "adalora", "loha", "lokr", "locon", "hira"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore:.*Merging is not supported:UserWarning")
def test_layers_are_left_out_that_a_method_would_get_wrong(way, layer, monkeypatch):
    """Taken layers merge exactly; made to take the others, the method fails, or merges to something else."""
    model = nn.Sequential(copy.deepcopy(LAYERS[layer]))
    options = {METHODS[way].size: 2}
    try:
        result, taken = adapt(way, copy.deepcopy(model), [], 1, options), True
    except CannotAdapt:
        taken = False
        monkeypatch.setattr(common.Limits, "reason", lambda self, layer: None)
        try:
            result = adapt(way, copy.deepcopy(model), [], 1, options)
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            return
    for parameter in result.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(2, 4, 7, 7)
    try:
        expected = result.model.eval()(x)
        if way == "locon":
            result.model[0].locon.merge_to()
            result.model[0].locon.restore()
            merged = result.model
        else:
            merged = result.model.merge_and_unload()
        same = torch.allclose(merged(x), expected, rtol=1e-3, atol=1e-4)
    except (RuntimeError, NotImplementedError):
        same = False
    assert same == taken


@pytest.mark.parametrize("init", ["activations", "gradient"])
def test_flora_can_start_from_data(init):
    result, batch = adapted("flora", "resnet", init=init), batch_of("resnet")
    before = {key: tensor.clone() for key, tensor in result.model.state_dict().items()}
    expected = model_of("resnet")(**batch).logits
    result.start([batch])
    after = result.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if "running" in key or "num_batches" in key)
    assert any(not torch.equal(after[key], before[key]) for key in before if "tucker_space" in key)
    assert torch.allclose(result.model.eval()(**batch).logits, expected, atol=1e-6)
    assert adapted("flora", "resnet").start is None


@pytest.mark.parametrize("name", ["bert", "convnext"])
def test_eva_starts_with_the_principal_components_of_the_inputs(name):
    result, batch = adapted("eva", name, r=9), batch_of(name)
    inputs, layers = {}, {key: m for key, m in result.model.named_modules() if hasattr(m, "lora_A")}
    names = {layer: key for key, layer in layers.items()}

    def keep(layer, args):
        inputs[names[layer]] = args[0].detach()

    for layer in layers.values():
        layer.register_forward_pre_hook(keep)
    before = result.model.eval()(**batch).logits
    result.start([batch, batch])
    assert torch.equal(result.model(**batch).logits, before)
    for key, layer in layers.items():
        rows = inputs[key].flatten(0, -2)
        rank = min(3, len(rows) - 1)
        _, _, expected = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        start = layer.lora_A["default"].weight
        assert len(start) == 9
        assert torch.allclose((start[:rank] @ expected[:rank].T).abs(), torch.eye(rank), atol=1e-3)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_as_peft_s_own_does(method):
    """PEFT's takes one example at a time, and no inputs without tokens, as the pooler's."""
    batch, model = batch_of("bert"), model_of("bert")
    examples = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(4)]
    result = adapted("corda", "bert", r=3, corda_method=method)
    result.start([batch, examples[1]])
    targets = [name for name, m in model.bert.encoder.named_modules() if isinstance(m, nn.Linear)]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights="corda",
                             corda_config=CordaConfig(corda_method=method))  # fmt: skip
    corda.preprocess_corda(model, config, lambda: [model(**example) for example in (*examples, examples[1])])
    expected, found = peft.get_peft_model(model, config), dict(result.model.named_modules())
    for name, layer in expected.named_modules():
        if hasattr(layer, "lora_A"):
            for key in ("lora_A", "lora_B"):
                one, other = (getattr(each, key)["default"].weight for each in (layer, found[name]))
                assert torch.allclose(one.T @ one, other.T @ other, rtol=1e-2, atol=1e-4)  # signs are free
            assert torch.allclose(layer.base_layer.weight, found[name].base_layer.weight, rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="corda_method='all': expected 'ipm' or 'kpm'"):
        adapted("corda", "bert", corda_method="all")
    with pytest.raises(CannotAdapt, match="CorDA needs a rank of at most the width 16 of .*, got 17"):
        adapted("corda", "bert", r=17)


def test_loraplus_trains_b_faster(tmp_path):
    result = adapted("loraplus", "bert", loraplus_lr_ratio=8)
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    groups = result.optimizer(arguments).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for key, parameter in result.model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (0.08 if "lora_B" in key or parameter.ndim == 1 else 0.01)
    assert not rates and groups[0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match=r"^loraplus_lr_ratio=0.5: expected a number from 1$"):
        adapted("loraplus", "bert", loraplus_lr_ratio=0.5)


PREFIX = {"hira": "hira_", "gralora": "gralora_", "miss": "miss_", "oft": "oft_"}
RIVALS = "rslora loraplus pissa olora orthogonal eva lora_ga corda hira gralora miss oft".split()


@pytest.mark.parametrize("way", RIVALS)
@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning")
def test_rivals_of_peft_train_and_come_back_from_disk(way, tmp_path):
    result, batch = adapted(way, "bert"), batch_of("bert")
    if result.start:
        result.start([batch])
    before = {key: p.detach().clone() for key, p in result.model.named_parameters()}
    after = result.model.eval()(**batch).logits
    assert torch.allclose(after, model_of("bert")(**batch).logits, atol=1e-5)
    train(result.model, tmp_path / "run", 2, result.callbacks, optimizer=result.optimizer)
    moved = {key for key, p in result.model.named_parameters() if not torch.equal(p, before[key])}
    assert any("modules_to_save" in key for key in moved) and any(PREFIX.get(way, "lora_") in key for key in moved)
    own = {key: p for key, p in result.model.named_parameters() if not p.requires_grad}
    if way in ("lora_ga", "corda"):  # the base model got its weights back
        for key, parameter in model_of("bert").named_parameters():
            found = [p for name, p in own.items() if name.replace(".base_layer", "").endswith(key)]
            assert all(torch.allclose(p, parameter, atol=1e-6) for p in found)
    else:
        assert not moved & own.keys()
    result.model.eval().save_pretrained(tmp_path / "trained")
    loaded = peft.PeftModel.from_pretrained(model_of("bert"), tmp_path / "trained").eval()
    expected = result.model(**batch).logits
    assert torch.allclose(loaded(**batch).logits, expected, atol=1e-6)
    assert torch.allclose(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------- bottleneck adapters


def bottleneck(adapter, x):
    return x + torch.relu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias


@pytest.mark.parametrize("way", ["houlsby", "pfeiffer"])
def test_adapters_in_a_bert_layer_are_those_of_the_papers(way):
    model = adapted(way, "bert", width=3, activation="relu").model.eval()
    layer = model.bert.encoder.layer[0]
    for name, parameter in layer.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter)
    x = torch.randn(2, 5, 16)
    attention, output = layer.attention.output, layer.output
    with torch.no_grad():
        found = layer(x)
        found = found[0] if isinstance(found, tuple) else found
        attended = layer.attention.self(x)[0] @ attention.dense.weight.T + attention.dense.bias
        middle = attention.LayerNorm(
            (bottleneck(attention.dense.adapter, attended) if way == "houlsby" else attended) + x
        )
        fed = layer.intermediate(middle) @ output.dense.weight.T + output.dense.bias
        if way == "houlsby":
            expected = output.LayerNorm(bottleneck(output.dense.adapter, fed) + middle)
        else:
            norm = nn.functional.layer_norm(fed + middle, [16], output.LayerNorm.weight, output.LayerNorm.bias, 1e-12)
            expected = bottleneck(output.LayerNorm.adapter, norm)
    assert torch.allclose(found, expected, atol=1e-5)


def test_adapters_are_in_every_block_and_have_their_width():
    for way, places in (("houlsby", 2), ("pfeiffer", 1)):
        for name in ("bert", "vit"):
            result = adapted(way, name, width=3)
            assert result.notes == [f"width 3 in {places} places"]
            assert trainable(result.model) - head_parameters(base(name), HEADS[name]) == places * (2 * 16 * 3 + 3 + 16)
    assert adapters.places(base("vit"), "pfeiffer") == ["vit.layers.0.mlp.fc2"]
    with pytest.raises(ValueError, match="activation='rellu'"):
        adapted("houlsby", "bert", width=3, activation="rellu")


# ------------------------------------------------------------------------------------------------- AdaLoRA


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT, of its own
def test_adalora_trains_is_cut_and_comes_back_from_disk(steps, tmp_path):
    result = adapted("adalora", "bert", steps=steps)
    train(result.model, tmp_path / "run", steps, result.callbacks)
    model, batch = result.model.eval(), batch_of("bert")
    layers = [module for module in model.modules() if hasattr(module, "lora_E")]
    kept = sum(int(layer.lora_E["default"].count_nonzero()) for layer in layers)
    assert 0 < kept <= fixed(result, "adalora") * len(layers)
    model.save_pretrained(tmp_path / "trained")
    loaded = peft.PeftModel.from_pretrained(model_of("bert"), tmp_path / "trained").eval()
    assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-6)
    assert torch.allclose(loaded.merge_and_unload()(**batch).logits, model(**batch).logits, atol=1e-5)


class Overflow(TrainerCallback):
    """Gradients of the first steps as fp16's scaler leaves them where it skips a step."""

    def __init__(self, steps, value):
        self.steps, self.value = steps, value

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step < self.steps:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(self.value)


@pytest.mark.parametrize(("steps", "value"), [(1, float("inf")), (1, float("nan")), (9, float("nan"))])
def test_adalora_is_cut_after_steps_that_were_skipped(steps, value, tmp_path):
    result = adapted("adalora", "bert", steps=9)
    train(result.model, tmp_path, 9, [Overflow(steps, value), *result.callbacks])
    layers = [module.lora_E["default"] for module in result.model.modules() if hasattr(module, "lora_E")]
    kept, target = sum(int(layer.count_nonzero()) for layer in layers), fixed(result, "adalora") * len(layers)
    note = f"{kept} of {sum(map(len, layers))} ranks remain, above the budget of {target}: gradients were not finite"
    assert kept <= target if steps == 1 else kept > target
    assert (note in result.notes) == (kept > target)


def test_adalora_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    runs = {}
    for name, resume in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        result = adapted("adalora", "bert", steps=10)
        train(result.model, tmp_path / "whole" if resume else tmp_path / name, 10, result.callbacks, resume)
        runs[name] = result.model.state_dict()
    assert all(torch.equal(runs["whole"][key], runs["resumed"][key]) for key in runs["whole"])


def test_adaloras_loss_has_its_regularisation():
    model, batch = adapted("adalora", "bert").model.eval(), batch_of("bert")
    plain = model_of("bert")(**batch).loss
    factors = [p for n, p in model.named_parameters() if "lora_A" in n] + [
        p.T for n, p in model.named_parameters() if "lora_B" in n
    ]
    norms = [torch.linalg.norm(factor @ factor.T - torch.eye(len(factor))) for factor in factors]
    expected = plain + 0.5 * torch.stack(norms).mean()
    assert torch.allclose(model(**batch).loss, expected)
    assert torch.allclose(model.base_model(**batch).loss, expected)  # PEFT's own, which it passes by


def test_adalora_refuses_a_schedule_that_cannot_be():
    with pytest.raises(ValueError, match="init_r=2: expected more than target_r=2"):
        adapted("adalora", "bert", target_r=2, init_r=2)
    with pytest.raises(ValueError, match="^r: AdaLoRA has target_r"):
        adapted("adalora", "bert", r=2)


def test_adalora_says_when_the_training_is_too_short(tmp_path):
    result = adapted("adalora", "bert", steps=10)
    with pytest.raises(ValueError, match="after 5, but the training has 2"):
        train(result.model, tmp_path, 2, result.callbacks)


# ------------------------------------------------------------------------------------------------- others, on a Trainer


@pytest.mark.parametrize("way", ["houlsby", "locon", "pissa", "eva", "lora_ga", "corda"])
def test_other_methods_go_on_from_a_checkpoint(way, tmp_path):
    runs = []
    for resume in (None, tmp_path / "checkpoint-2"):
        result = adapted(way, "bert")
        if result.start:
            result.start([batch_of("bert")])
        train(result.model, tmp_path, 4, result.callbacks, resume)
        runs.append(result.model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
