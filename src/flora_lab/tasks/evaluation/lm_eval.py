"""Language models tested by lm-eval, the Language Model Evaluation Harness; the extra [lm-eval] installs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def check(tasks: list[str]) -> None:
    """Raise ValueError naming a task that lm-eval does not have."""
    if not tasks:
        return
    from lm_eval.tasks import TaskManager

    if unknown := set(tasks) - set(TaskManager().all_tasks):
        raise ValueError(f"task.lm_eval: lm-eval has no task {min(unknown)!r}; `lm-eval ls tasks` lists them")


def evaluate(model: nn.Module, tokenizer: Any, tasks: list[str], batch_size: int) -> dict[str, float]:
    """{"arc_easy acc": 0.7, …}: what lm-eval reports. ``batch_size``: requests at a time."""
    if not tasks:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # lm-eval's default is 1
    return metrics_of(simple_evaluate(asked, tasks=tasks))


def metrics_of(evaluated: dict[str, Any]) -> dict[str, float]:
    """{"TASK METRIC": number} of what lm-eval, or lmms-eval, returns."""
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in evaluated["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }
