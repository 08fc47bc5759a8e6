"""What each engine makes of one tiny model in two processes. ``work`` runs every scenario with one engine."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_models import adapted, barrier, loss_of
from engines import DDP, FSDP1, FSDP2, Alone, FSDP1Flat, FSDP2Accelerate, FSDP2Leaves, State, TensorParallel
from engines_deepspeed import Zero, Zero2, Zero3, Zero3Init
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import flora
from flora.layers.starts import STARTS

ENGINES: dict[str, type[Alone]] = {
    "ddp": DDP, "fsdp1": FSDP1, "fsdp1-flat": FSDP1Flat, "fsdp2": FSDP2, "fsdp2-leaves": FSDP2Leaves,
    "fsdp2-accelerate": FSDP2Accelerate,
}  # fmt: skip
if hasattr(LlamaForCausalLM, "activation_checkpointing_enable"):  # by then it is made of distributed tensors
    ENGINES["tensor-parallel"] = TensorParallel
if importlib.util.find_spec("deepspeed"):
    ENGINES |= {"zero1": Zero, "zero2": Zero2, "zero3": Zero3, "zero3-init": Zero3Init}
DATA_STARTS = [name for name, each in STARTS.items() if each.from_data]


def train(engine: type[Alone], folder: Path, make: Callable, checkpointing: bool = False, **options: Any) -> State:
    model = make(engine, folder).train()
    if checkpointing:
        model.base_model.model.activation_checkpointing_enable()
    run = engine(model, **options)
    for number in range(3):
        run.step(number)
    return run.state()


def save(engine: type[Alone], folder: Path, make: Callable) -> State:
    run = engine(make(engine, folder).train())
    run.step(0)
    run.save(folder / "adapter")
    return {"output": run.output()}


def resume(engine: type[Alone], folder: Path, make: Callable) -> State:
    run = engine(make(engine, folder).train())
    run.step(0)
    (folder / "checkpoint").mkdir(exist_ok=True)
    run.checkpoint(folder / "checkpoint")
    barrier()
    run = engine(make(engine, folder, seed=2).train())
    run.resume(folder / "checkpoint")
    run.step(1)
    return run.state()


def merge(engine: type[Alone], folder: Path, make: Callable, outside: bool = False) -> State:
    """``outside``: where the engine's weights are not whole."""
    if outside and not engine.gathers:
        return {}
    run = engine(make(engine, folder).train())
    run.step(0)
    if engine.summons:
        with pytest.raises(ValueError, match="only a part of it is here.* within FullyShardedDataParallel.summon"):
            run.model.merge_adapter()
    with nullcontext() if outside else run.whole():
        run.model.merge_adapter()
    merged = {"merged": run.output(), **{name: tensor.clone() for name, tensor in run.state().items()}}
    with nullcontext() if outside else run.whole():
        run.model.unmerge_adapter()
    return {**merged, "unmerged": run.output()}


def drop(engine: type[Alone], folder: Path, make: Callable) -> State:
    """Dropout draws other numbers in each process, and all processes keep one adapter."""
    run = engine(make(engine, folder, dropout=0.5).train())
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    for number in range(2):
        run.step(number)
    state = {name: tensor for name, tensor in run.state().items() if "tucker" in name}
    states: list[State] = [state] * 2
    if dist.is_initialized():
        dist.all_gather_object(states, state)
    for name, tensor in states[1].items():  # none where FSDP keeps one copy, and gathers it for the first process
        torch.testing.assert_close(states[0][name], tensor)
    return {}


def start(engine: type[Alone], folder: Path, make: Callable) -> State:
    """The data start is made before the engine takes the model, from the batches of all processes."""
    model = make(engine, folder, init="gradient", init_weights=True).train()
    if engine.refuses_start:
        with pytest.raises(ValueError, match=engine.refuses_start):
            flora.initialize(model, [engine.own(0)], loss=loss_of)
        return {}
    flora.initialize(model, [engine.own(0), engine.own(1)], loss=loss_of)
    run = engine(model)
    run.step(0)
    run.step(1)
    return {"output": run.output()}


def failure(engine: type[Alone], folder: Path, make: Callable) -> State:
    """A data start fails in all processes if it fails in one."""
    if engine.refuses_start:
        return {}  # it does not begin
    model, alone = make(engine, folder, init="gradient", init_weights=True).train(), not dist.is_initialized()

    def loss_of_last(model: nn.Module, tokens: Tensor) -> Tensor:
        loss = loss_of(model, tokens)
        return loss * torch.nan if alone or dist.get_rank() == 1 else loss

    with pytest.raises(ValueError, match="the loss of a batch is nan, not finite"):
        flora.initialize(model, [engine.own(0)], loss=loss_of_last)
    return {}


def wrapped_start(engine: type[Alone], folder: Path, make: Callable) -> State:
    """The data start is made after the engine has taken the model, and trained on."""
    run = engine(make(engine, folder, init="gradient", init_weights=True).train())
    if engine.takes and dist.is_initialized():
        with pytest.raises(ValueError, match="initialize before the model is wrapped"):
            flora.initialize(run.model, [engine.own(0)], loss=loss_of)
        return {}
    flora.initialize(run.wrapped if engine is DDP else run.model, [engine.own(0), engine.own(1)], loss=loss_of)
    run.step(0)
    run.step(1)
    return {} if engine.takes else {"output": run.output()}


SCENARIOS: dict[str, Callable[..., State]] = {
    "train": train,
    "bf16": partial(train, bf16=True),
    "accumulate": partial(train, micro_batches=2),
    "checkpointing": partial(train, checkpointing=True),
    "save": save,
    "resume": resume,
    "merge": merge,
    "merge outside": partial(merge, outside=True),
    "dropout": drop,
    "start": start,
    "failure": failure,
    "wrapped start": wrapped_start,
}


def started(engine: type[Alone], folder: Path, init: str) -> list[Tensor] | str:
    """What the factors span after a data start, or why there is none."""
    model = adapted(engine, folder, init=init, init_weights=True)
    wrapped = engine(model).wrapped
    try:
        flora.initialize(wrapped if engine is DDP else model, [engine.own(0), engine.own(1)], loss=loss_of)
    except ValueError as error:
        return str(error)
    factors = [p.detach() for name, p in model.named_parameters() if ".factor_" in name]
    whole = [factor.full_tensor() if hasattr(factor, "full_tensor") else factor for factor in factors]
    return [factor @ factor.mT for factor in whole]


def work(rank: int, name: str, folder: Path, method: str = "flora") -> None:
    """One process of two. Rank 0 writes each scenario's tensors, or its error."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=120), rank=rank, world_size=2)
    make = partial(adapted, method=method)
    for scenario, run in SCENARIOS.items():
        try:
            result: Any = run(ENGINES[name], folder, make)
        except Exception:
            result = traceback.format_exc()
        if rank == 0:
            torch.save(result, folder / f"{scenario}.pt")
        barrier()
    for init in DATA_STARTS if method == "flora" else ():
        torch.save(started(ENGINES[name], folder, init), folder / f"{init}-{rank}.pt")
        barrier()
    dist.destroy_process_group()
