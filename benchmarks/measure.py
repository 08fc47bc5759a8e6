"""What `speed.py` and `memory.py` share: flags, clocks and adapted models."""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Row
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from variants import VARIANTS, adapt_variant, lora_parameters
from workloads import WORKLOADS, Case, Workload

from flora_lab.methods import AdaptedModel, CannotAdapt

WARM_UP_ROUNDS = {"cpu": 2, "cuda": 5}  # compiled for CUDA graphs, the second call records them
LEAST_ROUNDS, MOST_ROUNDS = 5, 500
LEARNING_RATE = 1e-5


# ------------------------------------------------------------------------------------------------- flags


def names_in(table: Mapping[str, Any] | Sequence[str]) -> Callable[[str], list[str]]:
    """A flag's type: names of a table, with commas between them."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in table]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected some of {', '.join(table)}")
        return text.split(",")

    return parse


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of both commands."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--workloads", type=names_in(WORKLOADS), default=list(WORKLOADS), metavar="NAME,…")
    flags.add_argument("--methods", type=names_in(VARIANTS), default=list(VARIANTS), metavar="NAME,…")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument(
        "--precision",
        choices=["fp32", "bf16", "bf16-base"],
        default="fp32",
        help="bf16: by autocast; bf16-base: a model in bf16 with adapters in float32, without autocast",
    )
    flags.add_argument(
        "--keep-memory", action="store_true", help="make the C library keep freed memory, as a GPU's allocator does"
    )
    flags.add_argument("--channels-last", action="store_true", help="lay convolutions and images out channels last")
    flags.add_argument("--tiny", action="store_true", help="small shapes, for a quick trial")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--output", type=Path, metavar="FILE.json")
    return flags


def prepare(args: argparse.Namespace) -> None:
    if args.keep_memory and "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # glibc reads it at the start of the process
        keep = {name: str(2**40) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep, "MALLOC_TOP_PAD_": str(2**28)})
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # PEFT and transformers warn about incomplete language models


# ------------------------------------------------------------------------------------------------- models to train


def case_of(workload: Workload, args: argparse.Namespace) -> Case:
    """The workload's case, in the types of ``--precision`` and the layout of ``--channels-last``."""
    case = workload.case(args.tiny, args.seed, args.device)
    if args.channels_last:
        case.model.to(memory_format=torch.channels_last)
        case.batch = tree_map_only(Tensor, _channels_last, case.batch)
    if args.precision == "bf16-base":
        case.model.bfloat16()
        case.batch = tree_map_only(Tensor, _low, case.batch)
    return case


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor
    return tensor.detach().contiguous(memory_format=torch.channels_last).requires_grad_(tensor.requires_grad)


def _low(tensor: Tensor) -> Tensor:
    return tensor.detach().bfloat16().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def adapted_models(workload: Workload, case: Case, args: argparse.Namespace) -> Iterator[tuple[str, AdaptedModel]]:
    """Each variant's model, all around the same weights. A variant that can't run prints a line with the reason."""
    rank = workload.lora_rank(args.tiny)
    budget = lora_parameters(case.model, workload.targets, rank)
    print(f"{'':16}{budget:>12,} parameters: LoRA of rank {rank}")
    for name in args.methods:
        try:
            adapted = adapt_variant(name, case.model, workload.targets, budget, args.seed)
        except CannotAdapt as reason:
            print(f"{name:16}{'left out':>12}: {reason}")
            continue
        try:
            with autocast(args):
                output = case.forward(adapted.model)
            case.backward(output)
            adapted.model.zero_grad(set_to_none=True)
        except RuntimeError as error:  # its numbers are of types that do not go together
            print(f"{name:16}{'left out':>12}: {str(error).splitlines()[0]}")
            continue
        print(f"{name:16}{adapted.parameters:>12,} {ranks(adapted)[:90]}", flush=True)
        yield name, adapted


def ranks(adapted: AdaptedModel) -> str:
    return "; ".join(adapted.notes)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def compile_model(name: str, model: nn.Module, mode: str) -> Callable[..., Any]:
    """The model compiled in a mode of ``torch.compile``, with a code object of its own: models that share one search
    through each other's guards."""

    def run(**batch: Any) -> Any:
        return model(**batch)

    run.__code__ = run.__code__.replace(co_name=name)
    return torch.compile(run, mode=mode)


def training_step(
    case: Case, model: nn.Module, run: Callable[..., Any], args: argparse.Namespace
) -> Callable[[], None]:
    """Forward, backward, optimizer step and zero_grad; ``run`` is the model or the compiled model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True) if trained else None

    def step() -> None:
        with autocast(args):
            output = case.forward(run)
        case.backward(output)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def inference(case: Case, run: Callable[..., Any], args: argparse.Namespace) -> Callable[[], Tensor]:
    @torch.no_grad()
    def forward() -> Tensor:
        with autocast(args):
            return case.forward(run)

    return forward


def each(names: Sequence[str], measure: Callable[[str], None]) -> list[str]:
    """Measure one workload after the other. One that raises prints its traceback, and the next one follows. The names
    of those that raised."""
    failed = []
    for name in names:
        print(f"\n{name}", flush=True)
        try:
            measure(name)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return failed


# ------------------------------------------------------------------------------------------------- clocks


def milliseconds(action: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def interleaved(
    actions: Mapping[str, Callable[[], Any]], args: argparse.Namespace, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each action in each round.

    A round runs every action once, in shuffled order. The first rounds warm up and are not counted. Then come
    ``args.rounds`` rounds, or as many as fit into ``seconds``.
    """
    shuffle = random.Random(args.seed).shuffle

    def round_of_all() -> dict[str, float]:
        order = list(actions)
        shuffle(order)
        times = {name: milliseconds(actions[name], args.device) for name in order}
        gc.collect()
        return times

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(WARM_UP_ROUNDS[args.device]):
            warm = round_of_all()
        possible = int(seconds * 1e3 / sum(warm.values()))
        count = args.rounds or min(max(possible, LEAST_ROUNDS), MOST_ROUNDS)
        rounds = [round_of_all() for _ in range(count)]
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: [times[name] for times in rounds] for name in actions}


def quartiles(times: list[float]) -> Row:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"rounds": len(times), "median_ms": median, "q1_ms": low, "q3_ms": high}
