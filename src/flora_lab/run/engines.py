"""Where the trials of a comparison run: in processes of this machine, or on Ray's machines.

Each engine yields, as a call ends, the call's arguments and a function that returns its result or raises its error.
An error, or a process that is killed, affects only its own call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from queue import SimpleQueue
from typing import Any

import torch

Ended = Iterator[tuple[tuple, Callable[[], Any]]]
SERVER = "forkserver"
RETRIES = 3  # of a call whose machine died


class Killed(RuntimeError):
    """The process of a call was ended from outside."""


def local(work: Callable[..., Any], calls: list[tuple], workers: int) -> Ended:
    """Processes on this machine, a new one per call, each with its own GPU if there are several."""
    free: SimpleQueue[int] = SimpleQueue()
    for index in range(workers):
        free.put(index)
    threads = ThreadPoolExecutor(workers)
    try:
        futures = {threads.submit(_in_process, work, call, free): call for call in calls}
        yield from ((futures[future], future.result) for future in as_completed(futures))
    except BaseException:  # the caller was interrupted, or gave up
        threads.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        threads.shutdown(cancel_futures=True)


def _in_process(work: Callable[..., Any], call: tuple, free: SimpleQueue[int]) -> Any:
    """``free``: the indices of the devices that no process uses."""
    index = free.get()
    try:
        with ProcessPoolExecutor(1, _context(), _begin, (index,)) as process:
            return process.submit(work, *call).result()
    except BrokenProcessPool as error:
        raise Killed("its process was killed, perhaps for lack of memory") from error
    finally:
        free.put(index)


def _context() -> BaseContext:
    """New processes fork from a server that has imported what a trial needs, which takes 6 s.

    With a GPU each starts from nothing: an import may initialize CUDA (bitsandbytes does), which a fork can't use.
    """
    if torch.accelerator.is_available() or SERVER not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context(SERVER)
    context.set_forkserver_preload(["flora_lab.run.job"])
    return context


def _begin(index: int) -> None:
    """The first thing that a new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    take_device(index)


def _end_with_parent() -> None:
    """Otherwise the trials of a killed comparison would go on beside those of its next start."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def take_device(index: int) -> None:
    """Let this process see one of several GPUs; to be called before it uses any."""
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index % count]


def on_ray(work: Callable[..., Any], calls: list[tuple], workers: int) -> Ended:
    """Ray's machines, one GPU per call if they have some; ``workers`` calls run at the same time.

    A call whose machine dies runs again on another one; with shared storage (``mirror``) it goes on from its last
    checkpoint. The cluster is the one at RAY_ADDRESS, or else this machine.
    """
    import ray

    # left to itself, Ray would wait for a cluster of which only a file is left
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(None if ray.is_initialized() else address, ignore_reinit_error=True, log_to_driver=False)
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    # decorated, not `options`: Ray then ends a process after one call on a GPU, or the next call would stay on that GPU
    remote = ray.remote(**needs, max_retries=RETRIES)(work)
    waiting, running = list(calls), {}
    while waiting or running:
        while waiting and len(running) < workers:
            call = waiting.pop(0)
            running[remote.remote(*call)] = call
        done, _ = ray.wait(list(running))
        yield from ((running.pop(one), partial(ray.get, one)) for one in done)


ENGINES: dict[str, Callable[[Callable[..., Any], list[tuple], int], Ended]] = {"local": local, "ray": on_ray}
