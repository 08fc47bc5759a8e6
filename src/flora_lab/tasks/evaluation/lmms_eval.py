"""Image-text models tested by lmms-eval on VQAv2, GQA, POPE and others; the extra [lmms-eval] installs it."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.evaluation.lm_eval import metrics_of

if TYPE_CHECKING:
    from torch import nn


def check(tasks: list[str]) -> None:
    """Raise ValueError naming a task that lmms-eval does not have."""
    if not tasks:
        return
    from lmms_eval.tasks import TaskManager

    if unknown := set(tasks) - set(TaskManager().all_tasks):
        raise ValueError(f"task.lmms_eval: lmms-eval has no task {min(unknown)!r}")


def evaluate(model: nn.Module, processor: Any, tasks: list[str], kind: str) -> dict[str, float]:
    """{"pope pope_accuracy": 0.86, …}: what lmms-eval reports of the merged model; merges the adapter for good.

    ``kind``: lmms-eval's name of the model's class, such as llava_hf.
    """
    if not tasks:
        return {}
    from lmms_eval.evaluator import simple_evaluate

    with TemporaryDirectory() as folder:
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        return metrics_of(simple_evaluate(model=kind, model_args=f"pretrained={folder}", tasks=tasks, batch_size=1))
