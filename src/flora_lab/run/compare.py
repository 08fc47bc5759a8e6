"""What `flora compare` runs: methods × budgets × seeds, as the paper compares (section 5.3, Tables 1 to 3).

Each method at each budget is tried with its grid of learning rates on the first seed; the best on the validation split
runs with the other seeds. Every method gets the same number of trials, and the test split chooses nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from flora.models import quiet
from flora_lab import analysis
from flora_lab.analysis import rows, tables
from flora_lab.run.job import Job, learning_rate, need_one
from flora_lab.run.trial import Trial, plan, run, subject
from flora_lab.settings import Config, ConfigError, checked

FREE = ("budget", "methods.*.learning_rate", "training.learning_rate")  # named by each trial


def compare(config: Config, methods: Sequence[str] = ()) -> list[dict]:
    """Every row of the comparison, old and new. Started again it goes on where it stopped."""
    keys = config.comparison
    if unknown := set(methods) - set(config.methods):
        raise ConfigError(f"--methods {min(unknown)}: the job has {', '.join(config.methods)}")
    for name in ("seeds", "rates"):
        values = getattr(keys, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"comparison.{name}={values}: expected one or more different values")
    job = Job(config, FREE)
    if PartialState().num_processes > 1 and (keys.workers > 1 or keys.engine != "local"):
        raise ConfigError("several processes share each run here: comparison.workers=1, comparison.engine=local")
    reasons = plan(config, list(methods or config.methods), keys.budgets or [config.budget])
    need_one(reasons)
    job.open()
    file = job.base_file()
    for (name, budget), reason in reasons.items():
        if reason and not any((row["method"], row["budget"]) == (name, budget) for row in job.rows()):
            job.add({**subject(config, name, budget), "left_out": reason})
    runnable = [pair for pair, reason in reasons.items() if not reason]

    first, *others = keys.seeds
    grid = [(pair, learning_rate(config, pair[0]) * rate) for rate in keys.rates for pair in runnable]
    _run(job, [Trial(*pair, first, rate) for pair, rate in grid], file)
    best = {pair: _best(job.rows(), pair) for pair in runnable}
    _run(job, [Trial(*pair, seed, best[pair]) for seed in others for pair in runnable], file)
    found = job.rows()
    if job.main:
        page = analysis.analyse([job.folder], job.folder)
        said = [analysis.text(rows.results(found)), *tables.remarks(found)]
        print("\n" + "\n\n".join(said))
        print(f"\nevery run is a line of {job.folder / rows.RESULTS}; the report: {page}")
    return found


def _best(found: list[dict], pair: tuple[str, int | None]) -> float:
    """The learning rate that did best on the validation split."""
    return rows.results(row for row in found if (row["method"], row["budget"]) == pair)[0].learning_rate


def _run(job: Job, trials: list[Trial], file: Path | None) -> None:
    """Those that have not ended yet; a row is kept as each ends."""
    left = job.left(trials)
    keys, workers = job.config.comparison, min(job.config.comparison.workers, len(left))
    with tqdm(total=len(trials), initial=len(trials) - len(left), unit="run", disable=not job.main) as bar:
        tasks = [(asdict(job.config), trial, file, job.folder / "trials" / trial.name, workers) for trial in left]
        failed = []
        for result in ENGINES[keys.engine](_work, tasks, workers):
            try:
                row = result()
            except Exception as error:  # the others' rows are kept first
                failed.append(error)
                continue
            job.add(row)
            metric, value = row["metric"], row["validation"][row["metric"]]
            bar.update()
            bar.set_postfix_str(f"{row['method']}, {row['budget'] or ''} {metric} {value:.3f}")
    if failed:
        raise failed[0]


def _work(keys: dict, trial: Trial, file: Path | None, folder: Path, workers: int) -> dict[str, Any]:
    """A trial in a process of its own."""
    quiet()
    config = checked(keys)
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // max(1, workers)))
    try:
        return run(config, trial, file, folder, bar=workers < 2)
    except Exception as error:
        error.add_note(f"in the run {trial.name}")
        raise


# --------------------------------------------------------------------------------------------------------- engines
# Each yields, as a task ends, a function that returns what came of it, or raises.


def local(work: Callable[..., Any], tasks: list[tuple], workers: int) -> Iterator[Callable[[], Any]]:
    """Processes on this machine, a new one for each run, with a GPU of its own where there are several; one at a time
    runs in this process, where `accelerate launch` may have set up more."""
    if workers < 2:
        for task in tasks:
            found = work(*task)  # an error ends it all, as everywhere in one process
            yield lambda: found  # noqa: B023
        return
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for index in range(workers):
        free.put(index)
    pool = ProcessPoolExecutor(workers, context, _share, (free,), max_tasks_per_child=1)
    try:
        futures = [pool.submit(_on_device, work, *task) for task in tasks]
        yield from (partial(_result, future) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ConfigError("a run was ended from outside, for want of memory perhaps: start again to go on") from error


def _share(free: Any) -> None:
    """What a new process begins with: the free devices, and an eye on the process that started it."""
    global _free
    _free = free
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)  # or a killed comparison's runs would go on beside those of its next start


def _on_device(work: Callable[..., Any], *task: Any) -> Any:
    """Before this process has touched a GPU: it sees the one that it takes, and gives it back."""
    index, count = _free.get(), torch.cuda.device_count()
    if count > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[index % count]
    try:
        return work(*task)
    finally:
        _free.put(index)


def on_ray(work: Callable[..., Any], tasks: list[tuple], workers: int) -> Iterator[Callable[[], Any]]:
    """Ray's machines, a GPU a run where they have some; `workers` is how many run at a time."""
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    remote, waiting, running = ray.remote(work).options(**needs), list(tasks), []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(remote.remote(*waiting.pop(0)))
        done, running = ray.wait(running)
        yield from (partial(ray.get, one) for one in done)


ENGINES: dict[str, Callable[..., Iterator[Callable[[], Any]]]] = {"local": local, "ray": on_ray}
