"""Every contract of a layer that keeps its weight quantized, against the weight that the layer computes with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora
from flora import FloraConfig, plan
from flora.layers.starts import rms, sample, unified_scale
from flora.layers.weights.storage import dense_of, kept_state
from flora.tucker import project
from reference import delta, layers

OUT, IN = 64, 128


def _bitsandbytes(linear: nn.Linear, name: str, **options) -> nn.Module:
    import bitsandbytes as bnb

    layer = getattr(bnb.nn, name)(IN, OUT, bias=linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def four_bit(quant_type: str, nested: bool = False) -> Callable[[nn.Linear], nn.Module]:
    options = {"compute_dtype": torch.float32, "quant_type": quant_type, "compress_statistics": nested}
    return lambda linear: _bitsandbytes(linear, "Linear4bit", **options)


def eight_bit(linear: nn.Linear) -> nn.Module:
    return _bitsandbytes(linear, "Linear8bitLt", has_fp16_weights=False)


def torchao(name: str, **options) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        model = nn.Sequential(linear)
        quantization.quantize_(model, getattr(quantization, name)(**options))
        return model[0]

    return make


def intx(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))(linear)


def hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def quanto(name: str, freeze: bool = True) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from optimum import quanto

        model = nn.Sequential(linear)
        quanto.quantize(model, weights=getattr(quanto, name))
        if freeze:
            quanto.freeze(model)
        return model[0]

    return make


def fp8_linear(block: tuple[int, int] | None) -> Callable[[nn.Linear], nn.Module]:
    """transformers' layer, with a scale for each block of its weight, or one scale."""

    def make(linear: nn.Linear) -> nn.Module:
        from transformers.integrations.finegrained_fp8 import FP8Linear

        layer = FP8Linear(IN, OUT, block_size=block, has_bias=True).requires_grad_(False)
        scale = layer.weight_scale_inv.data.fill_(linear.weight.abs().max().item() / 448)
        layer.weight.data = (linear.weight.data / scale.max()).to(torch.float8_e4m3fn)
        layer.bias.data = linear.bias.data
        layer.weight_scale_inv.data *= 1 + torch.rand(scale.shape)  # the blocks differ
        return layer

    return make


def casting(layer: nn.Module) -> nn.Module:
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    return layer


def gptqmodel(name: str, **options) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from gptqmodel.nn_modules.qlinear import torch as gptq
        from gptqmodel.nn_modules.qlinear import torch_awq as awq

        sizes = {"bits": 4, "group_size": 32, "in_features": IN, "out_features": OUT, "bias": True}
        layer = getattr(awq if name.startswith("Awq") else gptq, name)(sym=False, desc_act=False, **sizes, **options)
        groups = linear.weight.data.unflatten(1, (-1, 32))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        pack = getattr(layer, "pack_original", layer.pack)
        pack(linear, scales, (-low / scales).round(), g_idx=(torch.arange(IN) // 32).int())
        layer.post_init()
        return layer.eval()

    return make


@dataclass(frozen=True)
class Base:
    """``make`` quantizes a linear layer. ``autocast``: whether the layer itself runs under it; ``merges``: whether it
    can be quantized anew."""

    id: str
    make: Callable[[nn.Linear], nn.Module]
    autocast: bool = True
    merges: bool = True


BASES = [
    Base("bitsandbytes-nf4", four_bit("nf4")),
    Base("bitsandbytes-nf4-nested", four_bit("nf4", nested=True)),
    Base("bitsandbytes-fp4", four_bit("fp4")),
    Base("bitsandbytes-int8", eight_bit),
    Base("torchao-int8", torchao("Int8WeightOnlyConfig")),
    Base("torchao-float8", torchao("Float8WeightOnlyConfig")),
    Base("torchao-int4", intx),
    Base("hqq", hqq),
    Base("quanto-int8", quanto("qint8"), autocast=False),
    Base("quanto-int4", quanto("qint4")),
    Base("quanto-float8", quanto("qfloat8")),
    Base("quanto-not_frozen", quanto("qint8", freeze=False), autocast=False),
    Base("transformers-float8", fp8_linear(None)),
    Base("transformers-float8-blocks", fp8_linear((48, 32))),
    Base("layerwise_casting", casting),
]
if find_spec("gptqmodel"):  # not among the test dependencies: it compiles its kernels
    BASES += [
        Base("gptq", gptqmodel("TorchLinear"), merges=False),
        Base("awq", gptqmodel("AwqTorchLinear", register_buffers=True), merges=False),
    ]
every_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.id)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Net(nn.Module):
    """A quantized layer between plain ones."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = nn.Linear(IN, IN), base.make(nn.Linear(IN, OUT)), nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(self.first(x))))


def config(**options) -> FloraConfig:
    return FloraConfig(**{"r": 4, "target_modules": ["layer"], "init_weights": False, **options})


def literal_fp8(layer: nn.Module, x: Tensor) -> Tensor:
    """What transformers' kernels compute; they need a GPU."""
    weight, scale = layer.weight.float(), layer.weight_scale_inv
    rows, columns = layer.block_size or weight.shape
    scale = scale.expand(OUT // rows + 1, IN // columns + 1) if scale.ndim == 0 else scale
    each = [[weight[i, j] * scale[i // rows, j // columns] for j in range(IN)] for i in range(OUT)]
    return F.linear(x, torch.stack([torch.stack(row) for row in each]).to(x.dtype), layer.bias.to(x.dtype))


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr("transformers.integrations.finegrained_fp8.FP8Linear.forward", literal_fp8)


@pytest.fixture(autouse=True)
def _quiet_libraries():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="bitsandbytes|torchao|hqq|optimum")
        yield


@every_base
@torch.no_grad()
def test_the_dense_weight_is_what_the_layer_computes_with(base):
    layer, x = base.make(nn.Linear(IN, OUT)), torch.randn(5, IN)
    half = {"rtol": 0.01, "atol": 0.01}  # gptqmodel's kernels compute so
    expected = F.linear(x, dense_of(layer, "weight").float(), layer.bias.float())
    torch.testing.assert_close(layer(x), expected, **(CLOSE if base.merges else half))
    layer.eval()(x)  # bitsandbytes may now keep it in another order, and in fewer digits
    again = F.linear(x, dense_of(layer, "weight").float(), layer.bias.float())
    torch.testing.assert_close(again, expected, rtol=0.02, atol=0.02)


@every_base
def test_a_fresh_adapter_changes_nothing(base):
    x = torch.randn(5, IN)
    with torch.no_grad():
        expected = Net(base)(x)
        assert torch.equal(get_peft_model(Net(base), config(init_weights=True))(x), expected)


@every_base
def test_the_plan_counts_weights_and_not_bytes(base):
    made = plan(Net(base), config())
    assert [(row.shape, row.execution) for row in made.rows] == [((OUT, IN), "factored")]
    plain = sum(p.numel() for p in Net(Base("plain", lambda linear: linear)).parameters())
    assert made.base_parameters == pytest.approx(plain, abs=OUT)  # HQQ's bias is no parameter


@every_base
def test_the_scale_is_the_dense_weights(base):
    (layer,) = layers(get_peft_model(Net(base), config()))
    size = rms([sample(dense_of(layer.base_layer, "weight").float())])
    expected = unified_scale(*size, (OUT, IN), (4, 4), 0, "random")
    assert layer.space("default").scale.item() == pytest.approx(expected)
    assert all(p.dtype == torch.float32 for p in layer.tucker_space.parameters())


@every_base
@pytest.mark.parametrize("execution", ["auto", "merged"])
def test_the_update_runs_and_learns_beside_the_layer(base, execution):
    model, x = get_peft_model(Net(base), config(execution=execution)), torch.randn(5, IN)
    (layer,) = layers(model)
    space, net = layer.space("default"), model.base_model.model
    hidden = net.first(x).detach().requires_grad_()
    update = F.linear(hidden, delta(space))
    expected = net.last(torch.tanh(layer.base_layer(hidden) + update))
    result = model(x)
    torch.testing.assert_close(result, expected, **CLOSE)
    ours = torch.autograd.grad(result.square().sum(), list(space.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(space.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("base", [base for base in BASES if base.autocast], ids=lambda base: base.id)
def test_under_autocast_the_quantized_weight_is_never_taken_for_numbers(base):
    model, x = get_peft_model(Net(base), config(init_weights=True)), torch.randn(5, IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), Net(base)(x), rtol=0.05, atol=0.05)


@every_base
def test_save_and_load(base, tmp_path):
    model, x = get_peft_model(Net(base), config()).eval(), torch.randn(5, IN)
    with torch.no_grad():
        expected = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(Net(base), tmp_path).eval()(x), expected)


@every_base
@torch.no_grad()
def test_a_batch_may_mix_adapters(base):
    model, x = get_peft_model(Net(base), config()).eval(), torch.randn(3, IN)
    model.add_adapter("other", config())
    mixed = model(x, adapter_names=["default", "other", "__base__"])
    torch.testing.assert_close(mixed[2:], Net(base).eval()(x[2:]), **CLOSE)
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "base", [base for base in BASES if base.id.startswith("bitsandbytes")], ids=lambda base: base.id
)
@torch.no_grad()
def test_on_a_gpu(base):
    model, x = get_peft_model(Net(base).cuda(), config()).eval(), torch.randn(5, IN, device="cuda")
    (layer,) = layers(model)
    net, hidden = model.base_model.model, model.base_model.model.first(x)
    dense = dense_of(layer.base_layer, "weight").float()
    assert layer.space("default").core.device == dense.device == x.device
    output = F.linear(hidden, dense + delta(layer.space("default")), layer.base_layer.bias)
    expected = net.last(torch.tanh(output))
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    with pytest.warns(UserWarning, match="has quantized 1 weights anew"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(dense_of(layer.base_layer, "weight").float(), dense)


class Half(nn.Module):
    """A plain layer, and one whose weight is kept as float8, which no product takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Bilinear(8, 8, 8)
        self.second.weight = nn.Parameter(self.second.weight.to(torch.float8_e4m3fn), requires_grad=False)


def test_what_can_not_run_beside_its_layer_is_refused_before_anything_is_wrapped():
    model = Half()
    with pytest.raises(ValueError, match=r"layer 'second' \(Bilinear\): 'weight' is kept as float8, and no update can"):
        get_peft_model(model, FloraConfig(target_modules=["first", "second"]))
    assert type(model.first) is nn.Linear


@every_base
def test_activations_start_beside_a_quantized_weight(base):
    x = torch.randn(64, IN) * 0.7 ** torch.arange(IN)
    model = get_peft_model(Net(base), config(init="activations", init_weights=True))
    with torch.no_grad():
        inputs = model.base_model.model.first(x)
    flora.initialize(model, [x])
    leading = layers(model)[0].space("default").factors[1][:, :2].float()
    centred = inputs - inputs.mean(0)
    assert (centred @ leading).square().sum() > 0.8 * torch.linalg.svdvals(centred)[:2].square().sum()


def starts_as_with_the_dense_weight(model: nn.Module, dense: nn.Module, batch: Tensor, loss: Callable) -> None:
    """The factors of a gradient start must hold as much of the dense weight's gradient as those beside that weight."""
    weight = layers(dense)[-1].base_parameter.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(dense.eval(), batch), weight)
    held = []
    for each in (model, dense):
        flora.initialize(each, [batch], loss=loss)
        space = layers(each)[-1].space("default")
        inner = [None if not factor.any() else factor.detach() for factor in space.factors]
        held.append(project(gradient, inner).norm() / gradient.norm())
    assert held[0] > 0.995 * held[1] > 0.1


@every_base
@pytest.mark.parametrize("targets", [["layer"], ["first", "layer"]], ids=["first", "second"])
def test_the_gradient_of_a_quantized_weight_starts_it_as_of_a_dense_one(base, targets):
    options = {"init": "gradient", "init_weights": True, "target_modules": targets}
    net = Net(base)
    plain = Net(Base("plain", lambda linear: linear))
    plain.load_state_dict({n: t for n, t in net.state_dict().items() if not n.startswith("layer")}, strict=False)
    plain.layer.weight.data, plain.layer.bias.data = dense_of(net.layer, "weight").float(), net.layer.bias.float()
    model, dense = (get_peft_model(each, config(**options)) for each in (net, plain))
    directions = torch.randn(16, 3)
    x = torch.randn(16, IN) * 0.9 ** torch.arange(IN)
    starts_as_with_the_dense_weight(model, dense, x, lambda model, x: (model(x) * directions).sum())


@pytest.mark.parametrize("base", [base for base in BASES if base.merges], ids=lambda base: base.id)
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_merging_quantizes_anew_and_unmerging_is_exact(base, safe):
    model, x = get_peft_model(Net(base), config(scale=5.0)).eval(), torch.randn(5, IN)
    (layer,) = layers(model)
    with torch.no_grad():
        before = model(x)
        plain, state = dense_of(layer.base_layer, "weight"), kept_state(layer.base_layer, "weight")
        wanted = plain.float() + delta(layer.space("default"))
        with pytest.warns(
            UserWarning, match=r"has quantized 1 weights anew: they are off by [\d.e+]+ % of the update and"
        ):
            model.merge_adapter(safe_merge=safe)
        merged = dense_of(layer.base_layer, "weight").float()
    layer.base_layer(torch.randn(5, IN, requires_grad=True))  # some libraries take a new weight over only then
    assert torch.equal(dense_of(layer.base_layer, "weight").float(), merged)
    at_once = dense_of(base.make(linear_of(wanted)), "weight").float()
    assert (merged - wanted).norm() <= 1.1 * (at_once - wanted).norm()
    assert (merged - wanted).norm() < 0.5 * (merged - plain.float()).norm()
    model.unmerge_adapter()
    assert all(kept_state(layer.base_layer, "weight")[name] is value for name, value in state.items())
    assert torch.equal(dense_of(layer.base_layer, "weight"), plain)
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("nested", [False, True], ids=["nf4", "nested"])
def test_merging_into_four_bits_that_a_kernel_for_cpus_has_put_into_another_order(nested):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = get_peft_model(Net(Base("nf4", four_bit("nf4", nested))), config(scale=5.0))
    (layer,) = layers(model)
    weight = layer.base_layer.weight
    wanted = dense_of(layer.base_layer, "weight") + delta(layer.space("default")).detach()
    assert weight.quant_state.dtype == torch.float32
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.warns(UserWarning, match="has quantized 1 weights anew"):
        model.merge_adapter()
    at_once = dense_of(four_bit("nf4", nested)(linear_of(wanted)), "weight")
    merged = dense_of(layer.base_layer, "weight")
    assert layer.base_layer.weight.quant_state.dtype == torch.float32
    assert (merged - wanted).norm() <= 1.1 * (at_once - wanted).norm()


class Abstract(nn.Module):
    """The class that gptqmodel's kernels inherit from."""

    __module__, __qualname__ = "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"


class Foreign(Abstract):
    """A kernel that packs its weight in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = IN, OUT, nn.Parameter(torch.randn(OUT))
        self.register_buffer("qweight", torch.randn(OUT, IN).half())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype), self.bias.to(x.dtype))


def test_what_can_not_be_quantized_anew_is_refused_before_any_weight_is_merged():
    base = Base("foreign", lambda linear: Foreign())
    model = get_peft_model(Net(base), config(target_modules=["first", "layer"]))
    weight = model.base_model.model.first.base_layer.weight.clone()
    foreign = model.base_model.model.layer.base_layer
    torch.testing.assert_close(dense_of(foreign, "weight"), foreign.qweight.float(), rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"layer 'layer': its weight of shape \[64, 128\] is kept as GPTQ or AWQ"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.weight, weight)


def quantized_conv(layer: nn.Module) -> nn.Module:
    from optimum import quanto

    model = nn.Sequential(layer)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model[0]


def quantized_embedding(name: str) -> Callable[[nn.Embedding], nn.Module]:
    def make(table: nn.Embedding) -> nn.Module:
        import bitsandbytes as bnb

        layer = getattr(bnb.nn, name)(table.num_embeddings, table.embedding_dim)
        layer.load_state_dict(table.state_dict())
        return layer.to("cpu")

    return make


IMAGE, TOKENS = (lambda: torch.randn(2, 4, 9, 8)), (lambda: torch.arange(12).reshape(3, 4))
OTHERS = {
    "quanto-Conv2d": (quantized_conv, lambda: nn.Conv2d(4, 8, 3, stride=2), IMAGE),
    "casting-Conv2d": (casting, lambda: nn.Conv2d(4, 8, 3, groups=2), IMAGE),
    "casting-depthwise": (casting, lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), IMAGE),
    "casting-ConvTranspose2d": (casting, lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE),
    "bitsandbytes-Embedding4bit": (quantized_embedding("EmbeddingNF4"), lambda: nn.Embedding(12, 64), TOKENS),
    "bitsandbytes-Embedding8bit": (quantized_embedding("Embedding8bit"), lambda: nn.Embedding(12, 64), TOKENS),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("execution", ["auto", "merged"])
@torch.no_grad()
def test_other_layers_are_as_with_the_dense_weight(name, execution, tmp_path):
    quantize, make, inputs = OTHERS[name]
    plain, x = make(), inputs()
    layer = quantize(copy.deepcopy(plain))
    plain.weight.copy_(dense_of(layer, "weight"))
    if getattr(plain, "bias", None) is not None:
        plain.bias.copy_(layer.bias)  # casting rounds it, too
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(layer), config(target_modules=["0"], execution=execution)).eval()
    torch.manual_seed(1)
    dense = get_peft_model(nn.Sequential(plain), config(target_modules=["0"])).eval()
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-3)
    state, before = kept_state(layer, "weight"), model(x)
    with pytest.warns(UserWarning, match="has quantized 1 weights anew"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=0.2, atol=0.2 * before.abs().max().item())
    model.unmerge_adapter()
    assert all(kept_state(layer, "weight")[key] is value for key, value in state.items())


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.requires_grad_())  # as prepare_model_for_kbit_training has it
        return self.last(checkpoint(lambda h: torch.tanh(self.layer(h)), hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_start_counts_a_layer_in_a_checkpoint_once(reentrant):
    base, started = BASES[0], []
    for make in (Net, Checkpointed):
        torch.manual_seed(0)
        net = make(base)
        net.reentrant = reentrant
        model = get_peft_model(net, config(init="gradient", init_weights=True))
        torch.manual_seed(0)
        flora.initialize(model, [torch.randn(16, IN)], loss=lambda model, x: model(x).square().mean())
        started.append([p.detach() @ p.detach().mT for p in layers(model)[0].space("default").factors])
    for mine, theirs in zip(*started, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("init", ["activations", "gradient"])
def test_other_layers_start_from_data(name, init):
    quantize, make, inputs = OTHERS[name]
    plain, x = make(), inputs()
    layer = quantize(copy.deepcopy(plain))
    plain.weight.data = dense_of(layer, "weight").float()
    options = {"init": init, "init_weights": True, "target_modules": ["0"]}
    model, dense = (get_peft_model(nn.Sequential(each), config(**options)) for each in (layer, plain))
    direction = torch.randn(model.eval()(x).shape)
    loss = lambda model, x: (model(x) * direction).sum()  # noqa: E731
    if init == "gradient":
        starts_as_with_the_dense_weight(model, dense, x, loss)
        return
    factors = []
    for each in (model, dense):
        torch.manual_seed(0)
        flora.initialize(each, [x])
        factors.append(layers(each)[0].space("default").factors)
    for mine, theirs in zip(*factors, strict=True):
        torch.testing.assert_close(mine @ mine.mT, theirs @ theirs.mT, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant:UserWarning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_the_example_of_the_documentation_trains(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained("base")
    data = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(16)]
    page = Path(__file__).parents[2].joinpath("docs/quantized.md").read_text()
    names = {"name": "base", "steps": 8, "data": data}
    exec(compile(page.split("```python\n")[1].split("```")[0], "quantized.md", "exec"), names)
    model = names["model"]
    assert len(layers(model)) == 14
    again = names["AutoModelForCausalLM"].from_pretrained("base", quantization_config=names["quantization"])
    loaded = PeftModel.from_pretrained(again, "my-adapter").eval()
    batch = data[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, model.eval()(batch).logits)
        with model.disable_adapter():
            untrained = model(batch, labels=batch).loss
        assert model(batch, labels=batch).loss < untrained


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(IN, OUT)
    linear.weight.data = weight.clone()
    return linear
