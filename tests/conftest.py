import os

# Two test processes with two threads each would fight over two cores. Set before torch is imported, so that the
# processes that tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
