"""Two processes against one, with every engine of distributed training: the same numbers.

DeepSpeed's rows are there where it is installed: `pip install deepspeed`, which needs a C++ compiler.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_models import TOKENS, adapted, logits
from engine_scenarios import DATA_STARTS, ENGINES, SCENARIOS, started, work
from engines import State, alone
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flora import FloraConfig
from processes import START


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory) -> tuple[str, Path]:
    """The name, and the folder of what two processes made of every scenario."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.multiprocessing.start_processes(work, (request.param, folder), nprocs=2, start_method=START)
    return request.param, folder


def result(folder: Path, scenario: str) -> State:
    made = torch.load(folder / f"{scenario}.pt")
    assert isinstance(made, dict), made
    return made


def trained(state: State) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for name, tensor in sorted(state.items()) if "tucker" in name])


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "bf16"])
def test_two_processes_are_as_one(engine, scenario, tmp_path):
    name, folder = engine
    got, want = result(folder, scenario), SCENARIOS[scenario](alone(ENGINES[name]), tmp_path, adapted)
    bounds = {"rtol": 1e-9, "atol": 1e-12} if ENGINES[name].dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert got.keys() == want.keys() or (scenario == "start" and ENGINES[name].refuses_start)
    for key, tensor in got.items():
        torch.testing.assert_close(tensor, want[key], **bounds, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_in_bf16_go_where_one_goes(engine, tmp_path):
    name, folder = engine
    reference = alone(ENGINES[name])
    start = trained(adapted(reference, tmp_path).state_dict())
    got, want = result(folder, "bf16"), SCENARIOS["bf16"](reference, tmp_path, adapted)
    moved = trained(want) - start
    assert (trained(got) - trained(want)).norm() < 0.02 * moved.norm()


def test_what_an_engine_saves_loads_without_it(engine):
    name, folder = engine
    reference = alone(ENGINES[name])
    base = reference.base(folder).to(reference.dtype)
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    torch.testing.assert_close(logits(loaded(TOKENS)), result(folder, "save")["output"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", DATA_STARTS)
def test_a_data_start_is_the_same_in_every_process_or_refused(engine, init):
    name, folder = engine
    first, second = (torch.load(folder / f"{init}-{rank}.pt") for rank in range(2))
    if name == "tensor-parallel" and init == "activations":
        assert "is tensor parallel: init='gradient' can start it" in first and "is tensor parallel" in second
        return
    if ENGINES[name].takes:
        reason = "has a copy of its core" if name in ("zero1", "zero2") else "the model is sharded (FSDP1, ZeRO-3)"
        assert reason in first and reason in second
        return
    want = (
        started(alone(ENGINES[name]), folder, init) if init == "gradient" else second
    )  # random sums are each process's own
    for mine, other, alike in zip(first, second, want, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, alike, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_tensor_parallelism_in_bf16_loses_no_small_update(style):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        base = nn.Sequential(nn.Linear(18, 6)).requires_grad_(False).bfloat16()
        base[0].weight.fill_(1.0)  # the next bfloat16 is 2⁻⁷ away
        base[0].bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 1]))  # added once
        parallelize_module(base, init_device_mesh("cpu", (1,)), {"0": style()})
        model = get_peft_model(base, FloraConfig(r=2, target_modules=["0"], init_weights=False))
        space = model.base_model.model[0].space("default")
        x = torch.tensor([[1.0, -1.0, 0.0] * 6])  # sums to 0, and so does the base layer's output
        with torch.no_grad():
            space.core.mul_(2.0**-10 / space.delta().abs().amax())
            want, result = x @ space.delta().float().mT, model(x.bfloat16()).float()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(result[:, :5], want[:, :5], rtol=0, atol=0.03 * want.abs().max().item())
    torch.testing.assert_close(result[:, 5:], 1 + want[:, 5:], rtol=0, atol=2**-8)


def test_a_weight_that_an_older_transformers_has_cut_is_refused():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(4, 2))
    model[1]._hf_tp_plan = "colwise"
    reason = r"layer '1' \(Linear\): 'weight' of shape \[2, 4\] is one process's part.* before 5.17"
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, FloraConfig(r=2, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
