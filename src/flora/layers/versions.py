"""What the installed torch can do."""

from __future__ import annotations

import torch


def torch_since(major: int, minor: int) -> bool:
    """Whether torch is of this version or later."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (major, minor)
