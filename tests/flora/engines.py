"""Engines of distributed training, as users run them: what each makes of one tiny model in two processes.

An engine is a class with the verbs of ``Alone``. ``work`` runs every scenario with one engine in one process.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import flora
from flora import FloraConfig
from flora.layers.starts import STARTS
from flora.layers.weights.sharded import whole

State = dict[str, Tensor]
DATA_STARTS = [name for name, each in STARTS.items() if each.from_data]
TOKENS = torch.arange(12).view(2, 6)  # tokens


class Block(nn.Module):
    """A linear layer and a grouped convolution, whose update acts as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.linear(x).mT).mT.tanh()


class Experts(nn.Module):
    """Matrices in one stacked parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.stack[0]).tanh() @ self.stack[1]


class Tiny(nn.Module):
    _no_split_modules = ["Block"]  # noqa: RUF012  for PEFT's own wrap policy

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.experts = nn.Embedding(12, 8), nn.ModuleList([Block(), Block()]), Experts()
        self.head, self.checkpointing = nn.Linear(8, 12), False

    def activation_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.experts(x))


def adapted(engine: type[Alone], folder: Path, seed: int = 1, method: str = "flora", **options: Any) -> PeftModel:
    """The engine's model with an adapter; the same numbers wherever the seed is the same."""
    torch.manual_seed(0)
    base = engine.base(folder).to(engine.dtype)
    torch.manual_seed(seed)
    targets: dict[str, Any] = {"target_modules": engine.targets, "target_parameters": engine.parameters}
    if method == "lora":
        return get_peft_model(base, LoraConfig(r=2, **targets, init_lora_weights=False), autocast_adapter_dtype=False)
    return get_peft_model(base, FloraConfig(r=2, **targets, **{"init_weights": False, **options}))


def llama(folder: Path, **options: Any) -> LlamaForCausalLM:
    """A language model, from files as tensor parallelism needs it."""
    if not (folder / "llama").exists():
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes, num_key_value_heads=2, max_position_embeddings=16))
        made.save_pretrained(folder / "llama")
    barrier()
    return LlamaForCausalLM.from_pretrained(folder / "llama", **options)


def batch(number: int) -> Tensor:
    """The rows of all processes."""
    return torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(number))


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(model(tokens)).flatten(0, 1).float(), tokens.flatten())


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


class Alone:
    """One process, and the verbs of every engine.

    ``autocasts``: whether bf16 is autocast's; else all parameters are cast for every forward, and the gradients back.
    ``takes``: whether it refuses a data start. ``summons``: whether merging needs ``whole``.
    """

    dtype, autocasts, takes, summons = torch.float64, True, False, False
    targets, parameters = ("embed", "linear", "conv", "head"), ("experts.stack",)

    @staticmethod
    def base(folder: Path) -> nn.Module:
        return Tiny()

    def __init__(self, model: PeftModel, bf16: bool = False, micro_batches: int = 1) -> None:
        self.model, self.bf16, self.micro_batches = model, bf16, micro_batches
        self.wrapped = self.wrap()
        self.optimizer = self.make_optimizer()

    @staticmethod
    def own(number: int) -> Tensor:
        """This process's rows of a batch: all of them if it is alone."""
        return batch(number)[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch(number)

    def wrap(self) -> nn.Module:
        return self.model

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.wrapped.parameters() if p.requires_grad], lr=0.5, momentum=0.9)

    def loss(self, number: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and self.autocasts):
            return loss_of(self.wrapped, self.own(number))

    def unsynchronized(self) -> AbstractContextManager:
        """For every micro-batch but the last of a step."""
        return nullcontext()

    def step(self, number: int) -> None:
        for micro in range(self.micro_batches):
            with self.unsynchronized() if micro < self.micro_batches - 1 else nullcontext():
                (self.loss(10 * number + micro) / self.micro_batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def output(self) -> Tensor:
        with torch.no_grad():
            return logits(self.wrapped(TOKENS))

    def state(self) -> State:
        """Every tensor of the model whole, by the names that it has without the engine."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.wrapped, options=options)

    def save(self, folder: Path) -> None:
        state = self.state()
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)

    def checkpoint(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.wrapped, self.optimizer, options=options)
        torch.save((self.state(), state), folder / f"{dist.get_rank() if dist.is_initialized() else 0}.pt")

    def resume(self, folder: Path) -> None:
        model, optimizer = torch.load(folder / "0.pt")
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.wrapped, model, options=options)
        set_optimizer_state_dict(self.wrapped, self.optimizer, optimizer, options=options)

    def whole(self) -> AbstractContextManager:
        """Within it a user may merge."""
        return nullcontext()


class Cast(Alone):
    """One process that casts as engines do."""

    def loss(self, number: int) -> Tensor:
        if not self.bf16:
            return super().loss(number)
        low = {name: parameter.to(torch.bfloat16) for name, parameter in self.model.named_parameters()}
        return loss_of(partial(functional_call, self.model, low), self.own(number))


def alone(engine: type[Alone]) -> type[Alone]:
    """The single process to compare an engine with."""
    facts = {name: getattr(engine, name) for name in ("dtype", "takes", "targets", "parameters")}
    facts["base"] = staticmethod(llama if engine is TensorParallel else lambda folder: Tiny())
    return type("Reference", (Alone if engine.autocasts else Cast,), facts)


class DDP(Alone):
    def wrap(self) -> nn.Module:
        return nn.parallel.DistributedDataParallel(self.model)

    def unsynchronized(self) -> AbstractContextManager:
        return self.wrapped.no_sync()

    def state(self) -> State:
        return self.model.state_dict()


class FSDP1(Alone):
    """Sharded by PEFT's own wrap policy."""

    original, autocasts, takes, summons = True, False, True, True

    def wrap(self) -> nn.Module:
        precision = MixedPrecision(torch.bfloat16, torch.float32) if self.bf16 else None
        return FullyShardedDataParallel(
            self.model,
            auto_wrap_policy=fsdp_auto_wrap_policy(self.model),
            use_orig_params=self.original,
            mixed_precision=precision,
            device_id=torch.device("cpu"),
        )

    def unsynchronized(self) -> AbstractContextManager:
        return self.wrapped.no_sync()

    def whole(self) -> AbstractContextManager:
        return FullyShardedDataParallel.summon_full_params(self.wrapped, writeback=True)


class FSDP1Flat(FSDP1):
    original = False


class FSDP2(Alone):
    """One group per block, as accelerate shards a transformer."""

    autocasts = False

    def modules(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, Block)]

    def wrap(self) -> nn.Module:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        shard = partial(fully_shard, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
        for module in self.modules():
            shard(module)
        return shard(self.model)

    @contextmanager
    def unsynchronized(self) -> Iterator[None]:
        self.wrapped.set_requires_gradient_sync(False)
        yield
        self.wrapped.set_requires_gradient_sync(True)


class FSDP2Leaves(FSDP2):
    """One group per layer and per core space: nothing is whole outside its own forward."""

    def modules(self) -> list[nn.Module]:
        modules = reversed(list(self.model.modules()))
        return [m for m in modules if any(True for _ in m.parameters(recurse=False)) or isinstance(m, Block)]


class FSDP2Accelerate(FSDP2):
    """As accelerate shards a model whose weights only the first process has loaded."""

    @staticmethod
    def base(folder: Path) -> nn.Module:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
        model = Tiny()
        if dist.get_rank():
            for parameter in model.parameters():
                parameter.data.zero_()
        return model

    def wrap(self) -> nn.Module:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else None
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=True,
            mixed_precision_policy=policy,
        )
        # accelerate itself shards on accelerators only
        stand_in = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            is_main_process=dist.get_rank() == 0,
            mixed_precision="no",
            device=torch.device("cpu"),
        )
        return fsdp2_prepare_model(stand_in, self.model)


class TensorParallel(Alone):
    """transformers' tensor parallelism of a language model. Both processes have the same batch."""

    parameters = None
    targets = ("embed_tokens", "q_proj", "k_proj", "o_proj", "up_proj", "down_proj")

    @staticmethod
    def base(folder: Path) -> nn.Module:
        from transformers.distributed import DistributedConfig

        return llama(folder, distributed_config=DistributedConfig(tp_size=2))

    @staticmethod
    def own(number: int) -> Tensor:
        return batch(number)

    def state(self) -> State:
        return {name: whole(tensor).clone() for name, tensor in self.model.state_dict().items()}


class Zero(Alone):
    """DeepSpeed. Parameters of any size are partitioned in stage 3, as with transformers' "auto"."""

    stage, dtype, autocasts, takes = 1, torch.float32, False, True

    def wrap(self) -> nn.Module:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.micro_batches,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": self.bf16},
        }
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(self.parameters, lr=0.5, momentum=0.9)
        wrapped, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        return wrapped

    def make_optimizer(self) -> Any:
        return self.wrapped.optimizer

    def step(self, number: int) -> None:
        for micro in range(self.micro_batches):
            self.wrapped.backward(self.loss(10 * number + micro))
            self.wrapped.step()

    def state(self) -> State:
        with self.whole():
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def checkpoint(self, folder: Path) -> None:
        self.wrapped.save_checkpoint(folder)

    def resume(self, folder: Path) -> None:
        self.wrapped.load_checkpoint(folder)


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3

    def whole(self) -> AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0)


ENGINES: dict[str, type[Alone]] = {
    "ddp": DDP, "fsdp1": FSDP1, "fsdp1-flat": FSDP1Flat, "fsdp2": FSDP2, "fsdp2-leaves": FSDP2Leaves,
    "fsdp2-accelerate": FSDP2Accelerate,
}  # fmt: skip
if hasattr(LlamaForCausalLM, "activation_checkpointing_enable"):  # by then it is made of distributed tensors
    ENGINES["tensor-parallel"] = TensorParallel
if importlib.util.find_spec("deepspeed"):
    ENGINES |= {"zero1": Zero, "zero2": Zero2, "zero3": Zero3}


# ------------------------------------------------------------------------------------------------------------ scenarios


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


def merge(engine: type[Alone], folder: Path, make: Callable) -> State:
    run = engine(make(engine, folder).train())
    run.step(0)
    if engine.summons:
        with pytest.raises(ValueError, match="only a part of it is here.* within FullyShardedDataParallel.summon"):
            run.model.merge_adapter()
    with run.whole():
        run.model.merge_adapter()
    merged = {"merged": run.output(), **{name: tensor.clone() for name, tensor in run.state().items()}}
    with run.whole():
        run.model.unmerge_adapter()
    return {**merged, "unmerged": run.output()}


def start(engine: type[Alone], folder: Path, make: Callable) -> State:
    """The data start is made before the engine takes the model, from the batches of all processes."""
    model = make(engine, folder, init="gradient", init_weights=True).train()
    if engine is FSDP2Accelerate:
        with pytest.raises(ValueError, match="only the first process has loaded the model's weights"):
            flora.initialize(model, [engine.own(0)], loss=loss_of)
        return {}
    flora.initialize(model, [engine.own(0), engine.own(1)], loss=loss_of)
    run = engine(model)
    run.step(0)
    run.step(1)
    return {"output": run.output()}


def failure(engine: type[Alone], folder: Path, make: Callable) -> State:
    """A data start fails in all processes if it fails in one."""
    if engine is FSDP2Accelerate:
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
    "start": start,
    "failure": failure,
    "wrapped start": wrapped_start,
}


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


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
