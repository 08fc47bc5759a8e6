"""`accelerate launch` with files of examples/accelerate in two processes without an accelerator: as in one process.

accelerate starts FSDP on accelerators only. Without one, the script has to tell it that the processes belong together.
DeepSpeed's rows are there where it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors.torch import load_file
from torch.distributed import run as torchrun
from torch.utils.data import DataLoader

from processes import START

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train.py"
FILES = ("ddp", *(("zero1", "zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()))


def train(out: Path) -> None:
    sys.argv, torch.utils.data.DataLoader = [str(SCRIPT), str(out)], InOrder
    runpy.run_path(str(SCRIPT), run_name="__main__")


def tell(**keys: object) -> None:
    """Have the script's ``Accelerator()`` take arguments."""
    accelerate.Accelerator = partial(accelerate.Accelerator, **keys)


class InOrder(DataLoader):
    """Batches in the order of the data, so that one process can take those of two at once."""

    at_once = 1

    def __init__(self, dataset: list, batch_size: int, shuffle: bool) -> None:
        super().__init__(dataset, self.at_once * batch_size)


def alone(rank: int, folder: Path) -> None:
    tell(cpu=True)
    InOrder.at_once = 2
    train(folder / "alone")


def launched(rank: int, name: str, folder: Path) -> None:
    """One process of `accelerate launch`, forked in place of torchrun's."""

    def process(args: object) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        rendezvous = f"file://{folder}/{name}-rendezvous"
        dist.init_process_group("gloo", rendezvous, timedelta(seconds=120), rank=rank, world_size=2)
        tell(**{"cpu": True} if name == "ddp" else {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]})
        train(folder / name)
        engine = DistributedType.MULTI_CPU if name == "ddp" else DistributedType.DEEPSPEED
        assert accelerate.PartialState().distributed_type == engine
        dist.destroy_process_group()

    os.environ["DS_ACCELERATOR"] = "cpu"
    torchrun.run = process
    command = ["--config_file", EXAMPLES / "accelerate" / f"{name}.yaml", SCRIPT, folder]
    launch.launch_command(launch.launch_command_parser().parse_args([str(word) for word in command]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("accelerate")
    torch.multiprocessing.start_processes(alone, (folder,), nprocs=1, start_method=START)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_two_processes_are_as_one(name, folder):
    torch.multiprocessing.start_processes(launched, (name, folder), nprocs=2, start_method=START)
    got, want = (load_file(folder / each / "adapter_model.safetensors") for each in (name, "alone"))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
