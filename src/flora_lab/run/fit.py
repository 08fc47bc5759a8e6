"""One training loop for every task and method: transformers' Trainer, with its checkpoints, mixed precision and support
for several processes. Added here: an interrupted fit resumes, logs go to a folder of ours, one line shows the progress.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils.data import Subset
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from flora.files import replace_file, save_tensors
from flora_lab.run.progress import Progress
from flora_lab.run.seeded import Seeded
from flora_lab.run.sharding import prepare_to_shard
from flora_lab.run.trainer import TaskTrainer, trainer_of
from flora_lab.settings import Training
from flora_lab.tasks import Examples, Task


def fit(
    name: str,
    model: nn.Module,
    task: Task,
    data: dict[str, Examples],
    keys: Training,
    seed: int,
    folder: Path,
    logs: Path,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: Callable[[TrainingArguments], Optimizer] | None = None,
    bar: bool = True,
    last: Sequence[TrainerCallback] = (),
) -> Fit:
    """Train on data["train"], from the last checkpoint in ``folder`` if an earlier fit there was interrupted.

    ``callbacks`` run before a checkpoint is marked as complete, ``last`` afterwards.
    """
    checkpoints, progress = Checkpoints(folder / "checkpoints"), Progress(name, task.metric, bar)
    train, total = Seeded(data["train"], seed), steps(keys, data["train"])
    args = arguments(keys, total, seed, folder / "checkpoints")
    trainer = trainer_of(task, model)(
        model,
        args,
        # after its last step the Trainer would take one more, unless it ended an epoch
        train_dataset=train if checkpoints.steps < total else Subset(train, [0]),
        eval_dataset=data["validation"],
        data_collator=task.collate,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.reduce,
        # the method's and the task's callbacks first: a checkpoint is complete when they have written their part
        callbacks=[train, *callbacks, *task.callbacks(folder), checkpoints, *last],
        optimizers=(optimizer(args) if optimizer else None, None),
    )
    progress.attach(trainer)
    if trainer.is_world_process_zero():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(logs)))
    trainer.title, trainer.progress = name, progress
    if trainer.is_fsdp_enabled:
        prepare_to_shard(model)
    try:
        trainer.train(resume_from_checkpoint=checkpoints.last)
    finally:
        progress.close()
    trainer.say_if_diverged()
    trainer.remove_callback(TensorBoardCallback)  # later evaluations would start a second log
    return Fit(trainer, checkpoints.seconds(), median(checkpoints.epochs) if checkpoints.epochs else None)


def first_steps(
    model: nn.Module,
    task: Task,
    examples: Examples,
    keys: Training,
    optimizer: Callable[[TrainingArguments], Optimizer] | None = None,
) -> None:
    """Train on the examples for two steps, as `fit` would, and leave nothing behind.

    Raises FloatingPointError if the first loss is not finite, from which no training recovers.
    Two steps, since what the first one leaves may fail the next: PEFT's DoRA on 8-bit weights does on a CPU.
    """
    with TemporaryDirectory() as folder:
        args = arguments(replace(keys, loaders=0), 2, 0, Path(folder))
        args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
        made = (optimizer(args) if optimizer else None, None)
        kind = trainer_of(task, model)
        trainer = kind(model, args, train_dataset=examples, data_collator=task.collate, optimizers=made)
        Progress(shown=False).attach(trainer)
        with warnings.catch_warnings():  # the training itself will give them
            warnings.simplefilter("ignore")
            trainer.train()
        trainer.trained()
        if trainer.lost_at() == 1:
            raise FloatingPointError("the loss is not finite before any update")


@dataclass(frozen=True)
class Fit:
    """``seconds``: of the whole fit, over all its starts. ``epoch_seconds``: of an epoch's steps alone, the median of
    the epochs that were trained in one go; None if there are none."""

    trainer: TaskTrainer
    seconds: float
    epoch_seconds: float | None

    @property
    def model(self) -> nn.Module:
        """The trained model, as the training was given it."""
        return self.trainer.trained()

    def gathered(self, build: Callable[[], nn.Module]) -> nn.Module | None:
        """The trained model on the CPU, for the main process to work with alone; None in the other processes.

        All processes must call it. ``build`` makes the model as it was before the training; it gets the weights if the
        engine has cut the trained one into shards, whose forward would wait for all processes.
        """
        trainer, main = self.trainer, self.trainer.is_world_process_zero()
        if trainer.accelerator.distributed_type != DistributedType.FSDP:
            return self.model.cpu() if main else None
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not main:
            return None
        model = build().cpu().eval()
        missing = model.load_state_dict(state, strict=False).missing_keys  # bitsandbytes adds keys that no model takes
        if missing:
            raise RuntimeError(f"the gathered weights have no {missing[0]}")
        return model


def steps(keys: Training, examples: Examples) -> int:
    """Optimizer steps of the whole training: those of its epochs, or ``max_steps`` if that is less."""
    batch = keys.batch_size * PartialState(cpu=no_accelerator()).num_processes
    steps = keys.epochs * -(-len(examples) // batch)
    return min(steps, keys.max_steps or steps)


def arguments(keys: Training, total: int, seed: int, folder: Path) -> TrainingArguments:
    """Trainer's arguments; ``total``: optimizer steps (Trainer's own ``max_steps`` would also lengthen a training)."""
    interval = "steps" if keys.eval_steps else "epoch"
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=keys.batch_size,
        per_device_eval_batch_size=keys.eval_batch_size or keys.batch_size,
        dataloader_num_workers=keys.loaders,
        learning_rate=keys.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=keys.warmup_steps,
        weight_decay=keys.weight_decay,
        bf16=keys.mixed_precision == "bf16",
        fp16=keys.mixed_precision == "fp16",
        seed=seed,
        eval_strategy=interval,
        save_strategy=interval,
        logging_strategy=interval,
        eval_steps=keys.eval_steps,
        save_steps=keys.eval_steps or 0,
        logging_steps=keys.eval_steps or 0,
        **(_checkpointing() if keys.gradient_checkpointing else {}),
        save_total_limit=2,  # one is complete while the next is written
        use_cpu=no_accelerator(),
        report_to="none",  # `fit` adds TensorBoard, with a folder of ours
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # Trainer would use all GPUs in one process and multiply the batch; we leave several GPUs to accelerate
    made._n_gpu = min(made.n_gpu, 1)
    return made


def _checkpointing() -> dict[str, Any]:
    new = "activation_checkpointing"  # its name since transformers 5
    name = new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def no_accelerator() -> bool:
    """Whether to train on the CPU: accelerate and transformers must be told, for process groups and bf16."""
    return not torch.accelerator.is_available()


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete once every process has written its part, with the seconds of training so far.

    Also saves the statistics of batch normalisation: training changes them, but a PEFT checkpoint leaves them out.
    """

    MARK, STATISTICS = "complete.json", "statistics.safetensors"

    def __init__(self, folder: Path):
        marks = {int(mark.parent.name.split("-")[1]): mark for mark in folder.glob(f"checkpoint-*/{self.MARK}")}
        self.steps = max(marks, default=0)
        self.last = str(marks[self.steps].parent) if marks else None
        before = json.loads(marks[self.steps].read_text())["seconds"] if marks else 0.0
        PartialState().wait_for_everyone()  # every process has looked before the main one deletes
        if PartialState().is_main_process:
            for checkpoint in folder.glob("checkpoint-*"):
                if not (checkpoint / self.MARK).exists():
                    shutil.rmtree(checkpoint)
        self.started = time.perf_counter() - before
        self.epoch_started, self.stopped, self.whole_epoch = self.started, self.started, False
        self.epochs: list[float] = []

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.last and statistics(model):
            load_statistics(model, Path(self.last, self.STATISTICS))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch_started, self.whole_epoch = time.perf_counter(), float(state.epoch or 0).is_integer()

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self._leave_out()

    def _leave_out(self) -> None:
        """Do not count, as the epoch's, the time since its last step: of an evaluation, its pictures, a checkpoint."""
        now = time.perf_counter()
        self.epoch_started, self.stopped = self.epoch_started + now - self.stopped, now

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.whole_epoch:
            self.epochs.append(time.perf_counter() - self.epoch_started)

    def on_save(self, args, state, control, model=None, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            if moved := statistics(model):
                save_tensors(folder / self.STATISTICS, moved)
            with replace_file(folder / self.MARK) as file:
                file.write_text(json.dumps({"seconds": self.seconds()}))
        self._leave_out()


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances: buffers that training changes."""
    return {
        f"{name}.{key}": buffer.detach().cpu().clone()
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for key, buffer in module.named_buffers(recurse=False)
    }


def load_statistics(model: nn.Module, file: Path) -> None:
    buffers = dict(model.named_buffers())
    for name, tensor in load_file(file).items():
        buffers[name].copy_(tensor)
