"""The data start inside transformers' Trainer: ``Trainer(..., callbacks=[flora.Initialize()])``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from flora.tuner.data_start.initialize import initialize


class Initialize(TrainerCallback):
    """Calls ``flora.initialize`` with the first training batches, before the first step. A training that is resumed
    keeps its numbers.

    Args:
        batches: their number.
        adapter: its name.
        options: further arguments of ``flora.initialize``.
    """

    def __init__(self, batches: int = 32, adapter: str = "default", **options: Any) -> None:
        self.batches, self.adapter, self.options = batches, adapter, options

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Start the adapter."""
        if state.global_step:
            return
        dataset = train_dataloader.dataset
        # a loader of our own, so that the Trainer's order and random numbers stay as they are
        loader = DataLoader(
            dataset,
            batch_size=args.train_batch_size,
            shuffle=not isinstance(dataset, IterableDataset),
            generator=torch.Generator().manual_seed(args.seed + args.process_index),
            collate_fn=train_dataloader.collate_fn,
        )
        batches = _OnDevice(list(islice(loader, self.batches)), args.device)
        initialize(model, batches, self.adapter, **self.options)


class _OnDevice(Sequence):
    """Batches, each of which is on the device only while it is used."""

    def __init__(self, batches: Sequence[Any], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return _on_device(self.batches[index], self.device)


def _on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _on_device(value, device) for key, value in batch.items()}
    return type(batch)(_on_device(value, device) for value in batch) if isinstance(batch, (list, tuple)) else batch
