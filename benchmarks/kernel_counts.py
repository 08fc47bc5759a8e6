"""Kernels of a GPU in one run of an action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows import Row


def kernels(action: Callable[[], Any]) -> Row:
    """Number and milliseconds of the GPU's kernels and copies in one run of an action."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    own = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(own), "kernel_ms": sum(event.time_range.elapsed_us() for event in own) / 1e3}
