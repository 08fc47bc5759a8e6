"""Where the trials of a comparison run: in processes of this machine, or on Ray's machines. The calls that run on a
machine at the same time share its CPUs, as PyTorch's threads.

Each engine yields, as a call ends, the call's arguments and a function that returns its result or raises its error.
An error, or a process that is killed, affects only its own call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(_in_process, work, call, free, threads): call for call in calls}
        yield from ((futures[future], future.result) for future in as_completed(futures))
    except BaseException:  # the caller was interrupted, or gave up
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_process(work: Callable[..., Any], call: tuple, free: SimpleQueue[int], threads: int) -> Any:
    """``free``: the indices of the devices that no process uses."""
    index = free.get()
    try:
        with ProcessPoolExecutor(1, _context(), _begin, (index, threads)) as process:
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


def _begin(index: int, threads: int) -> None:
    """The first thing that a new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    take_device(index)
    torch.set_num_threads(threads)


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
    """Ray's machines, one GPU per call if they have some; ``workers`` calls run at the same time, each with its share
    of a machine's CPUs.

    A call whose machine dies runs again on another one; with shared storage (``mirror``) it goes on from its last
    checkpoint. The cluster is the one at RAY_ADDRESS, or else this machine.
    """
    import ray

    # left to itself, Ray would wait for a cluster of which only a file is left
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(None if ray.is_initialized() else address, ignore_reinit_error=True, log_to_driver=False)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = int(any(node.get("GPU") for node in nodes)), share_of_cpus(nodes, workers)
    # decorated, not `options`: Ray then ends a process after one call on a GPU, or the next call would stay on that GPU
    remote = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=RETRIES)(_with_threads)
    waiting, running = list(calls), {}
    while waiting or running:
        while waiting and len(running) < workers:
            call = waiting.pop(0)
            running[remote.remote(cpus, work, *call)] = call
        done, _ = ray.wait(list(running))
        yield from ((running.pop(one), partial(ray.get, one)) for one in done)


def share_of_cpus(nodes: Iterable[Mapping[str, float]], workers: int) -> int:
    """The most CPUs that each of ``workers`` calls can have at the same time, with one GPU each if there are some.

    Every node that can run a call has as many, so that it can take over another's. ``nodes``: Ray's resources of each.
    """
    nodes = list(nodes)
    of_gpus = [node for node in nodes if node.get("GPU")]
    rooms = [(int(node.get("CPU", 0)), int(node.get("GPU", workers))) for node in of_gpus or nodes]
    rooms = [(cpus, calls) for cpus, calls in rooms if cpus]

    def fit(share: int) -> int:
        return min(workers, sum(min(cpus // share, calls) for cpus, calls in rooms))

    most = min((cpus for cpus, _ in rooms), default=1)
    return next(share for share in range(most, 0, -1) if fit(share) == fit(1))


def _with_threads(threads: int, work: Callable[..., Any], *call: Any) -> Any:
    torch.set_num_threads(threads)
    return work(*call)


ENGINES: dict[str, Callable[[Callable[..., Any], list[tuple], int], Ended]] = {"local": local, "ray": on_ray}
