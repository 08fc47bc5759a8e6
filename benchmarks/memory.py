"""Memory of a training step, kept for backward and at the peak on a GPU, at equal trainable parameters.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --precision bf16

Kept for backward: the storages that autograd saves in the forward pass, each counted once, without the model's
parameters and buffers. Peak: the allocator's, with one variant's model alone on the GPU; a CPU has no such counter.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable

import torch
from measure import adapted_models, autocast, case_of, each, parser, prepare, ranks, training_step
from rows import Results, Row, table
from torch import Tensor, nn
from variants import VARIANTS
from workloads import WORKLOADS, Case, Workload


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def weights(model: nn.Module) -> dict[int, int]:
    return storages((*model.parameters(), *model.buffers()))


def saved_bytes(case: Case, model: nn.Module, args: argparse.Namespace) -> int:
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(args):
        output = case.forward(model)
    case.backward(output)
    model.zero_grad(set_to_none=True)
    own = weights(model)
    return sum(size for address, size in saved.items() if address not in own)


def peak_bytes(case: Case, model: nn.Module, args: argparse.Namespace) -> int | None:
    """The peak of the second step, when the optimizer's state exists, without base weights that it replaced."""
    if args.device != "cuda":
        return None
    step = training_step(case, model, model, args)
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    own = weights(model)
    idle = sum(size for address, size in weights(case.model).items() if address not in own)
    return torch.cuda.max_memory_allocated() - idle


def measure(name: str, workload: Workload, args: argparse.Namespace) -> list[Row]:
    case = case_of(workload, args)
    rows = []
    for method, adapted in adapted_models(workload, case, args):
        rows.append(
            {
                "measure": "memory",
                "workload": name,
                "group": workload.group,
                "method": method,
                "parameters": adapted.parameters,
                "ranks": ranks(adapted),
                "saved_bytes": saved_bytes(case, adapted.model, args),
                "peak_bytes": peak_bytes(case, adapted.model, args),
            }
        )
    return rows


def report(rows: list[Row]) -> str:
    """One line per variant, one column per workload: MiB kept for backward, and after a slash the peak."""
    cells = {(row["method"], row["workload"]): row for row in rows}
    names = [name for name in WORKLOADS if any(name == workload for _, workload in cells)]

    def cell(method: str, name: str) -> str:
        row = cells.get((method, name))
        if row is None:
            return "–"
        sizes = [row["saved_bytes"]] + ([] if row["peak_bytes"] is None else [row["peak_bytes"]])
        return " / ".join(f"{size / 2**20:,.1f}" for size in sizes)

    methods = [method for method in VARIANTS if any(method == own for own, _ in cells)]
    peaks = any(row["peak_bytes"] is not None for row in rows)
    caption = "**MiB saved for backward" + (" / at the peak**" if peaks else "** (no peak: this is a CPU)")
    return f"{caption}\n\n{table(['method', *names], [[m, *(cell(m, n) for n in names)] for m in methods])}"


def arguments() -> argparse.Namespace:
    return parser((__doc__ or "").partition("\n")[0]).parse_args()


def main() -> None:
    args = arguments()
    prepare(args)
    results = Results("memory", args)
    failed = each(args.workloads, lambda name: results.replace(measure(name, WORKLOADS[name], args)))
    print(f"\n{report([row for row in results.rows if row['workload'] in args.workloads])}")
    print(f"\nwritten to {results.path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
