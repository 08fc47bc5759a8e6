"""The least time that an adapter's own arithmetic could take on this machine, beside the measured time.

    python benchmarks/limits.py                     # for the rows of benchmarks/results/speed-cpu.json
    python benchmarks/limits.py --results FILE.json --workloads conv-64,unet

The operations are those of FLoRA's and LoRA's training step that the frozen model's step does not have. The limit is
their time at the rate of this machine's fastest large product, without passes over memory and calls. The same run
measures the rates: of a large matrix product, a large convolution, and a thin product as in adapters.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import milliseconds, names_in
from rows import rows_of, table
from torch import nn
from variants import lora_parameters
from workloads import WORKLOADS, Case, Workload

import flora
from flora import FloraConfig

ROUNDS = 15


def rate(operations: float, action: Callable[[], object]) -> float:
    """Operations per second, the median of ``ROUNDS``."""
    times = [milliseconds(action, "cpu") for _ in range(ROUNDS + 2)]
    return operations / statistics.median(times[2:]) * 1e3


def rates() -> dict[str, float]:
    a, b, thin = torch.randn(2048, 1024), torch.randn(1024, 1024), torch.randn(1024, 16)
    image, kernel = torch.randn(4, 256, 32, 32), torch.randn(256, 256, 3, 3)
    return {
        "large matrix product": rate(2 * 2048 * 1024 * 1024, lambda: a @ b),
        "large 3×3 convolution": rate(2 * 9 * 4 * 1024 * 256 * 256, lambda: F.conv2d(image, kernel, padding=1)),
        "thin matrix product": rate(2 * 2048 * 1024 * 16, lambda: a @ thin),
    }


def positions(case: Case, names: list[str]) -> dict[str, tuple[int, int]]:
    """For each layer the number of inputs and outputs per channel: rows or pixels of the whole batch."""
    seen: dict[str, tuple[int, int]] = {}

    def count(layer: nn.Module, tensor: torch.Tensor) -> int:
        channels = tensor.shape[-1] if isinstance(layer, nn.Linear) else tensor.shape[1]
        return tensor.numel() // channels

    def note(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
            seen[name] = count(layer, args[0]), count(layer, output)

        return hook

    handles = [case.model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        case.forward(case.model)
    for handle in handles:
        handle.remove()
    return seen


def flora_operations(shape: tuple[int, ...], ranks: tuple[int, ...], inputs: int, outputs: int) -> int:
    """Operations of FLoRA's step: projections of x and the gradient, the core's three products, the gradients of the
    two factors, the adapter's part of dx, and the cheaper of the merged and the factored forward."""
    (o, i), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    down, up, core = inputs * i * s, outputs * o * r, outputs * r * s * size
    merged, factored = o * i * size * r + r * s * i * size, down + core + up
    if size == 1:  # a matrix's core is folded into a factor, and the projected input is kept
        factored, core = up, 0
    return 2 * (3 * down + 2 * up + 3 * core + min(merged, factored))


def lora_operations(shape: tuple[int, ...], rank: int, inputs: int, outputs: int) -> int:
    """Operations of LoRA's step: its two layers, forward and twice backward."""
    return 3 * 2 * outputs * rank * (prod(shape[1:]) + shape[0])


def operations(workload: Workload) -> tuple[int, int]:
    """Operations of FLoRA's and LoRA's step."""
    case = workload.case(False, 0, "cpu")
    parameters = lora_parameters(case.model, workload.targets, workload.rank)
    rows = flora.plan(case.model, FloraConfig(budget=parameters, **workload.targets)).rows
    seen = positions(case, [row.module for row in rows])
    flora_count = sum(flora_operations(row.shape, row.ranks, *seen[row.module]) for row in rows)
    return flora_count, sum(lora_operations(row.shape, workload.rank, *seen[row.module]) for row in rows)


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    layers = [name for name, workload in WORKLOADS.items() if "target_parameters" not in workload.targets]
    results = str(Path(__file__).parent / "results" / "speed-cpu.json")
    flags.add_argument("--results", type=rows_of, default=results, metavar="FILE.json")
    flags.add_argument("--workloads", type=names_in(layers), default=layers, metavar="NAME,…")
    flags.add_argument("--threads", type=int, default=2)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    rows = {(row["workload"], row["method"]): row for row in args.results if row["measure"] == "step"}
    speeds = rates()
    print(table(["", "10⁹ operations per second"], [[name, f"{speed / 1e9:.0f}"] for name, speed in speeds.items()]))
    best = max(speeds.values())
    lines = []
    for name in args.workloads:
        if (name, "lora") not in rows:
            continue
        for method, count in zip(("flora-auto", "lora"), operations(WORKLOADS[name]), strict=True):
            limit = count / best * 1e3
            time = rows[name, method]["overhead"] * rows[name, "floor"]["median_ms"]
            lines.append([name, method, f"{count / 1e6:,.0f}", f"{limit:.1f}", f"{time:.1f}", f"{time / limit:.1f}"])
    print()
    print(table(["workload", "method", "10⁶ operations", "limit, ms", "measured, ms", "measured / limit"], lines))


if __name__ == "__main__":
    main()
