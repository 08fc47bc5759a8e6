"""How tests start processes: forked from a server that has imported torch, transformers and PEFT, which takes 6 s."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

START = "forkserver"
FORKED = multiprocessing.get_context(START)
FORKED.set_forkserver_preload(["flora.tuner", "transformers.trainer"])

EXAMPLES = Path(__file__).parents[1] / "examples"


def launch(
    rank: int, folder: Path, engine: str, words: Sequence[object], run: Callable[[Callable[[], None]], None]
) -> None:
    """One of two processes of `accelerate launch` with a file of examples/accelerate, forked in place of torchrun's.

    They meet in ``folder``; ``run`` takes the place of the command, ``words``, and gets what starts the group.
    """
    import torch.distributed as dist
    from accelerate.commands import launch
    from torch.distributed import run as torchrun

    rendezvous = f"file://{folder}/{engine}-rendezvous"
    start = partial(dist.init_process_group, "gloo", rendezvous, timedelta(seconds=120), rank=rank, world_size=2)

    def process(args: object) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        run(start)
        dist.destroy_process_group()

    torchrun.run = process
    command = ["--config_file", EXAMPLES / "accelerate" / f"{engine}.yaml", *words]
    launch.launch_command(launch.launch_command_parser().parse_args([str(word) for word in command]))
