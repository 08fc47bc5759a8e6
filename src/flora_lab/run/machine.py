"""The machine that a trial runs on, and the memory that it takes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def reset_peak() -> None:
    """Measure the peak from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):  # Linux
        Path("/proc/self/clear_refs").write_text("5")


class Reserved(TrainerCallback):
    """What PyTorch holds of the accelerator's memory in a fit, in bytes, as PEFT's method comparison counts it.

    A fit that was interrupted counts from its last start.
    """

    def __init__(self) -> None:
        self.total, self.steps = 0, 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a step."""
        if torch.cuda.is_available():
            self.total += torch.cuda.memory_reserved()
            self.steps += 1

    def numbers(self) -> dict[str, float | None]:
        """The most, and the mean over the steps."""
        return {
            "memory_reserved": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
            "memory_reserved_mean": self.total / self.steps if self.steps else None,
        }


def peak_memory() -> int | None:
    """Bytes: the accelerator's peak, or this process's if the system reports it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
