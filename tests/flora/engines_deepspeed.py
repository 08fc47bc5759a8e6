"""DeepSpeed among the engines."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from engine_models import llama
from engines import Alone, State, TensorParallel
from torch import nn


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
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
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
    stage, gathers = 3, True

    def whole(self) -> AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0)


class Zero3Init(Zero3):
    """Of a language model that is partitioned as it is loaded."""

    language, refuses_start = True, "the model is sharded"
    targets, parameters = TensorParallel.targets, None

    @staticmethod
    def base(folder: Path) -> nn.Module:
        from transformers.integrations import HfDeepSpeedConfig

        stage3 = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
        config = HfDeepSpeedConfig(stage3)  # transformers asks for it while it lives
        model = llama(folder)
        del config
        return model
