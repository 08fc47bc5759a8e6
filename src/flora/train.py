"""One training loop for every task and method: transformers' Trainer, and so are its checkpoints, several processes,
mixed precision. What is added: a fit that was interrupted goes on, logs have their place, one bar shows how it goes.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.integrations import TensorBoardCallback

from flora.files import replace_file
from flora.settings import Config, Training
from flora.tasks import Examples


def fit(
    name: str, model: nn.Module, data: dict[str, Examples], keys: Training, config: Config, folder: Path
) -> tuple[Trainer, float]:
    """Train on data["train"], or go on where an interrupted fit in `folder` stopped. With the seconds that it took."""
    checkpoints = Checkpoints(folder / "checkpoints")
    trainer = Trainer(
        model,
        arguments(keys, config.seed, folder / "checkpoints"),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
        compute_metrics=config.task.metrics,
        callbacks=[checkpoints, Progress(name, config.task.metric)],
    )
    trainer.remove_callback(PrinterCallback)  # the bar says it
    if trainer.is_world_process_zero():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(Path(config.output, "logs", name))))
    trainer.train(resume_from_checkpoint=checkpoints.last)
    return trainer, checkpoints.seconds()


def arguments(keys: Training, seed: int, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=keys.epochs,
        max_steps=keys.max_steps or -1,
        per_device_train_batch_size=keys.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=keys.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=keys.warmup_steps,
        weight_decay=keys.weight_decay,
        bf16=keys.mixed_precision == "bf16",
        fp16=keys.mixed_precision == "fp16",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,  # one is whole while the next is being written
        use_cpu=no_accelerator(),
        report_to="none",  # TensorBoard is added by `fit`, with a folder of ours
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def no_accelerator() -> bool:
    """To be said aloud: without it accelerate starts no process group, and transformers refuses bf16."""
    return not torch.accelerator.is_available()


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole once every process has written its part, with the seconds of training up to there."""

    MARK = "complete.json"

    def __init__(self, folder: Path):
        marks = sorted(folder.glob(f"checkpoint-*/{self.MARK}"), key=lambda mark: int(mark.parent.name.split("-")[1]))
        self.last = str(marks[-1].parent) if marks else None
        before = json.loads(marks[-1].read_text())["seconds"] if marks else 0.0
        PartialState().wait_for_everyone()  # every process has looked before one deletes
        if PartialState().is_main_process:
            for checkpoint in folder.glob("checkpoint-*"):
                if not (checkpoint / self.MARK).exists():
                    shutil.rmtree(checkpoint)
        self.started = time.perf_counter() - before

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark = Path(args.output_dir, f"checkpoint-{state.global_step}", self.MARK)
            with replace_file(mark) as file:
                file.write_text(json.dumps({"seconds": self.seconds()}))


class Progress(TrainerCallback):
    """One bar a fit, with the last validation metric at its end."""

    def __init__(self, name: str, metric: str):
        self.name, self.metric = name, metric

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            desc=f"{self.name:>10}",
            initial=state.global_step,
            total=state.max_steps,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 60,  # a log file needs no moving bar
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if f"eval_{self.metric}" in metrics:  # the validation split's; the test split has a prefix of its own
            self.bar.set_postfix_str(f"{self.metric} {metrics[f'eval_{self.metric}']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
