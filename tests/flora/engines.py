"""Engines of distributed training, as users run them. An engine is a class with the verbs of ``Alone``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from engine_models import TOKENS, Block, Tiny, batch, llama, logits, loss_of
from peft import PeftModel
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

from flora.layers.weights.sharded import whole

State = dict[str, Tensor]


class Alone:
    """One process, and the verbs of every engine.

    ``autocasts``: whether bf16 is autocast's; else all parameters are cast for every forward, and the gradients back.
    ``takes``: whether it refuses a data start once it has the model; ``refuses_start``: why it does so even before.
    ``summons``: whether merging needs ``whole``; ``gathers``: whether merging makes weights whole by itself.
    ``language``: whether its model is the language model.
    """

    dtype, autocasts, takes, summons, gathers, language = torch.float64, True, False, False, False, False
    refuses_start: str | None = None
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
    facts = {name: getattr(engine, name) for name in ("dtype", "takes", "gathers", "targets", "parameters")}
    facts["base"] = staticmethod(llama if engine.language else lambda folder: Tiny())
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

    refuses_start = "only the first process has loaded the model's weights"

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

    parameters, language = None, True
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
