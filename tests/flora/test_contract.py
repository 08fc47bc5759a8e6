"""Every contract of a wrapped layer, over every row of cases.py, in float64 against literal references."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from cases import CASES, Case, Listed
from flora import FloraConfig, FloraLayer
from flora.tuner.config import INITS
from flora.tuner.merging import _copy
from reference import delta, first, forward, layers

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_execution = pytest.mark.parametrize("execution", ["factored", "merged"])
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


def config(case: Case, **options) -> FloraConfig:
    target = {"target_parameters": list(case.parameters)} if case.parameters else {"target_modules": ["layer"]}
    return FloraConfig(**{"r": 3, "init_weights": False, **target, **case.config, **options})


def build(case: Case, dtype=torch.float64, **options):
    """(model with an adapter, a copy of its base layer, inputs)."""
    layer = case.make().to(dtype).eval()
    args = tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in case.inputs())
    if case.id == "Embedding-max_norm":
        first(layer(*args))  # the layer renorms its own rows at the first look
    base = copy.deepcopy(layer).requires_grad_(False)  # torch picks other kernels for weights that want a gradient
    return get_peft_model(Holder(layer), config(case, **options)).eval(), base, args


@every_case
@pytest.mark.parametrize("init", INITS)
def test_a_fresh_adapter_changes_nothing_at_all(case, init):
    model, base, args = build(case, init=init, init_weights=True)
    with torch.no_grad():
        assert torch.equal(first(model(*args)), first(base(*args)))


@every_case
def test_delta_is_the_einsum(case):
    model, _, _ = build(case)
    for layer in layers(model):
        space = layer.tucker_space["default"]
        assert layer.get_delta_weight("default").shape == space.shape == layer.base_parameter.shape
        torch.testing.assert_close(space.delta(), delta(space), **CLOSE)


@every_case
@every_execution
def test_forward_and_gradients_are_those_of_the_dense_weight(case, execution):
    model, base, args = build(case, execution=execution)
    args = tuple(a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
    parameters = [p for layer in layers(model) for p in layer.tucker_space["default"].parameters()]
    wanted = parameters + [a for a in args if torch.is_tensor(a) and a.requires_grad]

    result, expected = first(model(*args)), forward(model, base, args, {"default": 1.0})
    torch.testing.assert_close(result, expected, **CLOSE)
    assert not torch.equal(result, first(base(*args)))

    head = torch.randn_like(expected)
    ours = torch.autograd.grad((result * head).sum(), wanted)
    theirs = torch.autograd.grad((expected * head).sum(), wanted)
    for mine, dense in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, dense, **CLOSE)


@every_case
@every_execution
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_merge_and_unmerge(case, execution, safe):
    model, base, args = build(case, execution=execution)
    before = first(model(*args))
    weights = [(layer.base_parameter, layer.base_parameter.clone()) for layer in layers(model)]
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(first(model(*args)), before, **CLOSE)
    model.unmerge_adapter()
    for layer, (parameter, weight) in zip(layers(model), weights, strict=True):
        assert layer.base_parameter is parameter and torch.equal(parameter, weight)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not layers(merged) and type(merged.layer) is type(base)
    torch.testing.assert_close(first(merged(*args)), before, **CLOSE)


@every_case
def test_unmerging_gives_the_weight_back_to_the_bit_whatever_came_between(case):
    model, *_ = build(case, torch.bfloat16)
    weights = [layer.base_parameter.clone() for layer in layers(model)]

    def unchanged():
        return all(torch.equal(layer.base_parameter, w) for layer, w in zip(layers(model), weights, strict=True))

    model.merge_adapter()
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    model.unmerge_adapter()
    assert unchanged()

    model.merge_adapter()
    assert not unchanged()
    for layer in layers(model):
        for p in layer.space("default").parameters():
            p.data.add_(0.1)
    model.unmerge_adapter()
    assert unchanged()

    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", config(case))
    assert unchanged()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert all(len({space.scale.item() for space in layer.tucker_space.values()}) == 1 for layer in layers(model))
    with model.disable_adapter():
        assert unchanged()


@every_case
def test_a_weight_that_changed_while_merged_is_not_lost(case):
    model, *_ = build(case, torch.bfloat16)
    model.merge_adapter()
    copied, loaded = copy.deepcopy(model), copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    for other in (copied, loaded):  # other tensors with the same numbers
        other.unmerge_adapter()
    copy.deepcopy(model).double().unmerge_adapter()

    last = layers(model)[-1]
    entry = last.base_parameter.data.view(-1)[-1:]
    entry += entry.abs() + 1
    merged = [layer.base_parameter.clone() for layer in layers(model)]
    if getattr(last.get_base_layer(), "max_norm", None):
        return  # such a table changes its own rows whenever it is called
    for change in (model.unmerge_adapter, model.disable_adapter_layers, lambda: model.set_adapter("default")):
        with pytest.raises(ValueError, match="has changed while adapters were merged"):
            change()
        for layer, weight in zip(layers(model), merged, strict=True):
            assert layer.merged and torch.equal(layer.base_parameter, weight)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_and_unload()
    assert torch.equal(last.base_parameter, merged[-1])


@pytest.mark.parametrize("free, place", [(5, "cuda:0"), (4, "cpu")])
def test_merging_keeps_the_weight_on_an_accelerator_while_half_of_it_is_free(monkeypatch, free, place):
    memory = SimpleNamespace(mem_get_info=lambda device: (free, 10))
    monkeypatch.setattr(torch, "get_device_module", lambda device: memory)
    weight = SimpleNamespace(device=torch.device("cuda:0"), data=SimpleNamespace(to=lambda device, copy: device))
    assert str(_copy(weight)) == place


@every_case
def test_unload_gives_the_base_layer_back(case):
    model, base, args = build(case)
    restored = model.unload()
    with torch.no_grad():
        assert not layers(restored) and torch.equal(first(restored(*args)), first(base(*args)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_case
def test_merge_agrees_to_the_rounding_of_the_dtype(case, dtype):
    model, base, args = build(case, dtype)
    before = first(model(*args))
    assert before.dtype == first(base(*args)).dtype
    after = first(model.merge_and_unload()(*args))
    # a weight is rounded once by a merge; sums of a few dozen terms of order one follow
    scale = before.abs().max().clamp(min=1).item()
    torch.testing.assert_close(after, before, rtol=0, atol=64 * torch.finfo(dtype).eps * scale)


@every_case
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(case, tmp_path, low_memory):
    model, base, args = build(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Holder(base), tmp_path, low_cpu_mem_usage=low_memory).eval()
    for ours, saved in zip(layers(loaded), layers(model), strict=True):
        spaces = [layer.tucker_space["default"].state_dict() for layer in (ours, saved)]
        assert all(torch.equal(tensor, spaces[1][key]) for key, tensor in spaces[0].items())
    torch.testing.assert_close(first(loaded(*args)), first(model(*args)), **CLOSE)


@every_case
def test_two_adapters(case):
    model, base, args = build(case)
    model.add_adapter("other", config(case))
    alone = forward(model, base, args, {"default": 1.0})
    torch.testing.assert_close(first(model(*args)), alone, **CLOSE)
    model.set_adapter("other")
    torch.testing.assert_close(first(model(*args)), forward(model, base, args, {"other": 1.0}), **CLOSE)
    model.base_model.set_adapter(["default", "other"])
    both = forward(model, base, args, {"default": 1.0, "other": 1.0})
    torch.testing.assert_close(first(model(*args)), both, **CLOSE)
    for kind in ("linear", "cat"):
        model.add_weighted_adapter(["default", "other"], [0.5, -2.0], kind, combination_type=kind)
        model.set_adapter(kind)
        mixed = forward(model, base, args, {"default": 0.5, "other": -2.0})
        torch.testing.assert_close(first(model(*args)), mixed, **CLOSE)
        model.set_adapter("default")
        model.delete_adapter(kind)
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(first(model(*args)), alone, **CLOSE)


@every_case
def test_disable_and_scale(case):
    model, base, args = build(case)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(first(model(*args)), first(base(*args)))
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    torch.testing.assert_close(first(model(*args)), forward(model, base, args, {"default": 0.5}), **CLOSE)
    for layer in layers(model):
        layer.scale_layer(4.0)
    torch.testing.assert_close(first(model(*args)), forward(model, base, args, {"default": 2.0}), **CLOSE)
    for layer in layers(model):
        layer.unscale_layer()
    torch.testing.assert_close(first(model(*args)), forward(model, base, args, {"default": 1.0}), **CLOSE)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch_mode is not None], ids=lambda case: case.id)
@every_execution
def test_a_batch_may_mix_adapters(case, execution):
    model, base, args = build(case, execution=execution)
    model.add_adapter("other", config(case, execution=execution))
    size = args[0].shape[case.batch_mode]
    names = [["default", "__base__", "other"][n % 3] for n in range(size)]
    result = first(model(*args, adapter_names=names))
    for n, name in enumerate(names):
        expected = forward(model, base, args, {} if name == "__base__" else {name: 1.0})
        row = result.select(case.batch_mode, n)
        torch.testing.assert_close(row, expected.select(case.batch_mode, n), **CLOSE)


class Named(nn.Linear):
    """Its input has a name of its own, as in experts and routers."""

    def forward(self, hidden_states, *, twice=False):
        return super().forward(hidden_states * (2 if twice else 1))


def offsets(*numbers: int) -> dict:
    return {"input": torch.arange(9) % 11, "offsets": torch.tensor(numbers)}


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (lambda: Named(6, 4), {"hidden_states": torch.randn(3, 6)}),
        (lambda: Named(6, 4), {"hidden_states": torch.randn(3, 6), "twice": True}),
        (lambda: nn.Linear(6, 4), {"input": torch.randn(3, 6)}),
        (lambda: nn.EmbeddingBag(11, 5, mode="sum"), offsets(0, 2, 5)),
        (lambda: nn.EmbeddingBag(11, 5, mode="max"), offsets(0, 2, 5)),
        (lambda: nn.EmbeddingBag(11, 5, include_last_offset=True), offsets(0, 2, 5, 9)),
        (lambda: nn.Bilinear(6, 5, 4), {"input1": torch.randn(3, 6), "input2": torch.randn(3, 5)}),
    ],
)
@every_execution
def test_inputs_by_name(make, kwargs, execution):
    """With one adapter for all samples, and with one for each."""
    model, layer = get_peft_model(Holder(make()), config(CASES[0], execution=execution)).eval(), None
    model.add_adapter("other", config(CASES[0], execution=execution))
    layer = model.base_model.model.layer
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = layer(**kwargs)
        layer.merge()
        torch.testing.assert_close(layer(**kwargs), alone[name])
        layer.unmerge()
    with model.disable_adapter():
        alone["__base__"] = layer(**kwargs)
    names = ["other", "__base__", "default"]
    result = layer(**kwargs, adapter_names=names)
    torch.testing.assert_close(result, torch.stack([alone[name][n] for n, name in enumerate(names)]))
    with pytest.raises(ValueError, match="got 2 and 3 respectively"):
        layer(**kwargs, adapter_names=names[:2])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 4), (4,)), (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5)), (nn.MultiheadAttention(4, 2), (4, 4))],
    ids=lambda value: type(value).__name__,
)
def test_one_sample_has_no_adapter_of_each(layer, shape):
    model = get_peft_model(Holder(copy.deepcopy(layer)), config(CASES[0])).eval()
    inputs = [torch.randn(shape)] * (3 if isinstance(layer, nn.MultiheadAttention) else 1)
    with pytest.raises(ValueError, match=r"layer 'layer.*needs a batch, got one sample of shape \[4"):
        model(*inputs, adapter_names=["default"] * 4)


def test_parameters_in_a_list():
    model = get_peft_model(Holder(Listed()), FloraConfig(r=2, target_parameters=["ps.0", "ps.1"], init_weights=False))
    ps = model.base_model.model.layer.ps
    dense = [layer.base_parameter + delta(layer.space("default")) for layer in layers(model)]
    for n, p in enumerate(ps[:2]):
        torch.testing.assert_close(p, dense[n])
    assert ps[2] is ps.get_base_layer()[2] and len(ps[1:]) == 2 and bool(ps)
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="layer 'layer.ps.0': its weight is read, not called"):
        model.eval()(x, adapter_names=["default", "__base__"])


@every_case
@every_execution
def test_threads_share_a_model(case, execution):
    """Each with an adapter of its own in every sample; and no thread changes what another sees."""
    model, _, args = build(case, execution=execution)
    model.add_adapter("other", config(case, execution=execution))
    names = ["default", "other"]
    mixes = (
        [{}] if case.batch_mode is None else [{"adapter_names": [n] * args[0].shape[case.batch_mode]} for n in names]
    )
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}

    def serve(mix):
        with torch.no_grad():
            return [first(model(*args, **mix)) for _ in range(8)]

    expected = [serve(mix)[0] for mix in mixes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(serve, mixes * (4 // len(mixes))))
    finally:
        sys.setswitchinterval(interval)
    for n, answer in enumerate(answers):
        assert all(torch.equal(one, expected[n % len(mixes)]) for one in answer)
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, numbers) for name, (p, numbers) in before.items())


@every_case
@pytest.mark.parametrize(("execution", "grad"), [("factored", False), ("merged", False), ("auto", True)])
def test_compiles_without_a_graph_break(case, execution, grad):
    torch.compiler.reset()
    model, base, args = build(case, execution=execution)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # dynamo's own, about torch internals
        result = first(torch.compile(model.base_model.model, backend="eager", fullgraph=True)(*args))
    expected = forward(model, base, args, {"default": 1.0})
    torch.testing.assert_close(result, expected, **CLOSE)
    if grad:
        parameters = [p for layer in layers(model) for p in layer.tucker_space["default"].parameters()]
        head = torch.randn_like(expected)
        pairs = (torch.autograd.grad((output * head).sum(), parameters) for output in (result, expected))
        for mine, dense in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, dense, **CLOSE)


ONNX = {
    *("Linear-bias", "Conv1D", "Conv2d-plain", "Conv2d-depthwise", "ConvTranspose2d-groups", "Embedding"),
    *("MultiheadAttention-packed", "experts-both_stacks", "ParameterList"),
}


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ONNX], ids=lambda case: case.id)
@every_execution
def test_exports_to_onnx(case, execution):
    import onnxruntime as runtime

    model, _, args = build(case, torch.float32, execution=execution)
    expected, file = first(model(*args)), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch's own: this exporter is deprecated, and still the one that needs no more
        torch.onnx.export(model.base_model.model, args, file, dynamo=False, opset_version=17)
    session = runtime.InferenceSession(file.getvalue())
    inputs = {place.name: arg.numpy() for place, arg in zip(session.get_inputs(), args, strict=False)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, inputs)[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_export_that_would_leave_out_max_norm_is_refused():
    model, _, args = build(next(case for case in CASES if case.id == "Embedding-max_norm"))
    with pytest.raises(ValueError, match="leaves out max_norm: export with dynamo=True"):
        torch.onnx.export(model.base_model.model, args, io.BytesIO(), dynamo=False, opset_version=17)


@every_case
def test_pickle_and_deepcopy(case):
    model, _, args = build(case)
    before = first(model(*args))
    assert torch.equal(first(copy.deepcopy(model)(*args)), before)
    assert torch.equal(first(pickle.loads(pickle.dumps(model))(*args)), before)


@every_case
def test_only_the_core_space_trains(case):
    model, _, args = build(case, init_weights=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".tucker_space." in name for name in trainable)
    model.train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        first(model(*args)).square().mean().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert all(not torch.equal(after[name], p) for name, p in before.items())


@every_case
@every_execution
def test_dropout_is_off_in_evaluation_and_on_in_training(case, execution):
    model, base, args = build(case, execution=execution, dropout=0.5)
    torch.testing.assert_close(first(model(*args)), forward(model, base, args, {"default": 1.0}), **CLOSE)
    model.train()
    assert len({first(model(*args)).sum().item() for _ in range(20)}) > 1


def test_there_are_enough_cases():
    assert len({case.id for case in CASES}) == len(CASES) >= 60
    assert all(isinstance(layer, FloraLayer) for layer in layers(build(CASES[0])[0]))
