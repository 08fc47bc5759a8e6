"""A pytest plugin: tests make their tensors on the GPU unless they say otherwise (``pytest -p on_the_gpu``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield
