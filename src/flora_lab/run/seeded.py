"""Random changes of training examples, the same whichever way they are loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from flora_lab.tasks import Examples


class Seeded(TrainerCallback):
    """``examples`` whose crops, mirroring and the like follow from seed, epoch and index alone.

    So they don't depend on the worker that loads them, and a training that goes on within an epoch sees what it would
    have seen: the Trainer skips the batches before, and loads one batch ahead of the random numbers that it saves.
    """

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples, self.seed, self.epoch = examples, seed, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed[0]))  # torch.manual_seed would reach the accelerators, too
            return self.examples[index]
