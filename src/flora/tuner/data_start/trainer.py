"""The data start inside transformers' Trainer: ``Trainer(..., callbacks=[flora.Initialize()])``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from flora.tuner.data_start.guard import undisturbed
from flora.tuner.data_start.initialize import initialize
from flora.tuner.data_start.reduction import together


class Initialize(TrainerCallback):
    """Calls ``flora.initialize`` with training batches, before the first step. A training that is resumed keeps its
    numbers.

    The batches are as large as the training's, in a random order of their own; a sampler of the Trainer is not asked.
    A stream is read from its beginning, and again by the training. For one that can be read only once, call
    ``flora.initialize`` with batches of your own, and leave out the callback: the training would miss what it has read.

    Args:
        batches: their number.
        adapter: its name.
        options: further arguments of ``flora.initialize``: ``loss``, where the model returns none for a batch, …

    Raises:
        ValueError: a number of batches below 1; before the first step, a stream that has nothing left for the training.
        TypeError: an option that ``flora.initialize`` does not have.
    """

    def __init__(self, batches: int = 32, adapter: str = "default", **options: Any) -> None:
        if not isinstance(batches, int) or batches < 1:
            raise ValueError(f"batches is {batches!r}: expected their number, at least 1")
        signature(initialize).bind(None, None, adapter, **options)
        self.batches, self.adapter, self.options = batches, adapter, options

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Start the adapter."""
        if state.global_step:
            return
        with together(), undisturbed(model):
            batches = list(islice(_loader(train_dataloader, args), self.batches))
            _check_stream(train_dataloader.dataset)
        initialize(model, _OnDevice(batches, args.device), self.adapter, **self.options)


def _loader(given: Any, args: Any) -> DataLoader:
    """A loader like the Trainer's, whose order and random numbers stay as they are."""
    dataset, sampler = given.dataset, given.batch_sampler
    is_batched = given.batch_size is None and sampler is None  # by the dataset itself
    return DataLoader(
        dataset,
        batch_size=None if is_batched else getattr(sampler, "batch_size", args.train_batch_size),
        drop_last=not is_batched and getattr(sampler, "drop_last", given.drop_last),
        shuffle=not isinstance(dataset, IterableDataset),
        generator=torch.Generator().manual_seed(args.seed + args.process_index),
        collate_fn=given.collate_fn,
    )


def _check_stream(dataset: Any) -> None:
    """Raise ValueError if a stream has no samples left for the training."""
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(
            "the training data are a stream that can be read only once, and flora.Initialize has read it: call "
            "flora.initialize with batches of your own, and leave out the callback"
        )


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
