"""Where the suite saves time: one thread per test process, and no search for garbage in what the imports made."""

import gc
import os

# Two test processes with two threads each fight over two cores. Set before torch is imported, so that the processes
# that tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: F401  # it must register `random` before that is frozen
import pytest


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # every training collects garbage, 0.3 s a time among the 600 000 objects of torch and transformers


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or triton takes it for leaks


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
