"""Image-text models tested by lmms-eval on VQAv2, GQA, POPE and others; the extra [lmms-eval] installs it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.evaluation.lm_eval import metrics_of

if TYPE_CHECKING:
    from torch import nn

NUMBERS = "numbers.json"
# the number that the paper's appendix has of each benchmark, and the most it can be
HEADLINES = {
    "vqav2_val": ("exact_match", 1),
    "gqa": ("exact_match", 1),
    "vizwiz_vqa_val": ("exact_match", 1),
    "scienceqa_img": ("exact_match", 1),
    "textvqa_val": ("exact_match", 1),
    "pope": ("pope_accuracy", 1),
    "mmbench_en_dev_static": ("gpt_eval_score", 100),
}
# what `accelerate launch` and torchrun set for each of their processes
LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def check(tasks: list[str]) -> None:
    """Raise ValueError naming a task that lmms-eval does not have."""
    if not tasks:
        return
    from lmms_eval.tasks import TaskManager

    if unknown := set(tasks) - set(TaskManager().all_tasks):
        raise ValueError(f"task.lmms_eval: lmms-eval has no task {min(unknown)!r}")


def lost(model: nn.Module) -> list[str]:
    """The parameters, bottleneck adapters say, that neither merge nor fit the class of the model: lmms-eval, which
    loads that class, would measure the model without them."""
    import torch

    if hasattr(model, "merge_and_unload"):
        return []
    with torch.device("meta"):
        plain = dict(type(model)(model.config).named_parameters())
    return [name for name, _ in model.named_parameters() if name not in plain]


def evaluate(model: nn.Module, processor: Any, tasks: list[str], kind: str) -> dict[str, float]:
    """{"pope pope_accuracy": 0.86, …}: what lmms-eval reports of the merged model; merges the adapter for good. Of
    several tasks in HEADLINES also their "average", a share.

    It runs in a process of its own: in one of several that a launcher started, it would wait for the others and take
    its share of the questions only. ``kind``: lmms-eval's name of the model's class, such as llava_hf.
    Raises RuntimeError if that process fails; its messages go to the terminal.
    """
    if not tasks:
        return {}
    with TemporaryDirectory() as folder:
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        merged.cpu().save_pretrained(folder)  # the GPU's memory is for the other process
        processor.save_pretrained(folder)
        alone = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        ended = subprocess.run([sys.executable, "-m", __name__, folder, kind, *tasks], env=alone, check=False)
        if ended.returncode:
            raise RuntimeError(f"lmms-eval ended with exit code {ended.returncode}: its messages are above")
        numbers = json.loads(Path(folder, NUMBERS).read_text())
    return numbers | _average(numbers, tasks)


def _average(numbers: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """Nothing if a task is not in HEADLINES, or lmms-eval does not report its number."""
    places = {f"{task} {HEADLINES[task][0]}": HEADLINES[task][1] for task in tasks if task in HEADLINES}
    if not 1 < len(places) == len(tasks) or not places.keys() <= numbers.keys():
        return {}
    return {"average": fmean(numbers[place] / most for place, most in places.items())}


def _evaluate(folder: str, kind: str, *tasks: str) -> None:
    """The numbers of the model in ``folder``, to a file there."""
    from lmms_eval.evaluator import simple_evaluate

    keys = argparse.Namespace(output_path=folder)  # where tasks such as TextVQA write a file to submit
    evaluated = simple_evaluate(
        model=kind, model_args=f"pretrained={folder}", tasks=list(tasks), batch_size=1, cli_args=keys
    )
    Path(folder, NUMBERS).write_text(json.dumps(metrics_of(evaluated)))


if __name__ == "__main__":
    _evaluate(*sys.argv[1:])
