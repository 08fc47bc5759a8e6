"""What a step costs beside arithmetic: operations and microseconds per adapted layer, on layers so small that
arithmetic is free. It needs no GPU; with one, it counts kernels too.

    python benchmarks/launches.py
    python benchmarks/launches.py --device cuda
    python benchmarks/launches.py --table benchmarks/results/launches-cpu.json

A model has ``LAYERS`` layers of one kind, one after the other, with gradients flowing to its input. An *operation* is
what reaches PyTorch's dispatcher and computes or copies: views and empty tensors do not count. A step is forward and
backward; the base layers' own operations are in the numbers. Operations are the same on every machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from kernel_counts import kernels
from measure import each, interleaved, names_in, parser, prepare
from peft import LoraConfig, get_peft_model
from rows import Results, Row, rows_of, table
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from variants import VARIANTS, adapt_variant, disturb

from flora import FloraConfig
from flora_lab.methods import CannotAdapt
from flora_lab.methods.common import share_weights

LAYERS, RANK = 12, 2
LYCORIS_BUDGET = 4096  # of all layers together; sizes do not matter here
METHODS = ("floor", "lora", "flora-auto", "locon", "locon-bypass")
TARGETS = {"target_modules": r"\d+"}
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh")
WITHOUT_TENSORS = ("promote_types", "result_type", "can_cast")
READS = ("_local_scalar_dense", "is_nonzero", "equal")  # for which the host waits


@dataclass(frozen=True)
class Kind:
    """A row: ``layer`` makes one layer, ``shape`` is the input's."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]


KINDS = {
    "Linear": Kind(lambda: nn.Linear(16, 16), (8, 16)),
    "Conv2d 3×3": Kind(lambda: nn.Conv2d(8, 8, 3, padding=1), (1, 8, 4, 4)),
    "Conv2d depthwise 3×3": Kind(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 4, 4)),
}
# name: (the base model's type, whether autocast is on); adapters are float32 always
PRECISIONS = {
    "fp32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "bf16 base": (torch.bfloat16, False),
}


class Lists(TorchFunctionMode):
    """Counts the tensors whose numbers are read as a list, which no dispatcher sees on a CPU."""

    reads = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.reads += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


class Counter(TorchDispatchMode):
    """Counts the operations that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += computes(func)
        self.reads += func._schema.name.removeprefix("aten::") in READS
        return func(*args, **(kwargs or {}))


def computes(operation: Any) -> bool:
    """Whether an operation computes or copies. A view does not: its results share its argument's memory, and nothing is
    written."""
    returns = [r.alias_info for r in operation._schema.returns]
    is_view = bool(returns) and all(info is not None and not info.is_write for info in returns)
    return not is_view and operation._schema.name.removeprefix("aten::") not in EMPTY + WITHOUT_TENSORS


def models(kind: Kind, dtype: torch.dtype, names: list[str], args: argparse.Namespace) -> dict[str, nn.Module]:
    """Each variant's model; one that a variant cannot adapt is left out."""
    torch.manual_seed(args.seed)
    base = nn.Sequential(*(kind.layer() for _ in range(LAYERS))).requires_grad_(False).train().to(args.device)
    groups = getattr(base[0], "groups", 1)
    configs = {"lora": LoraConfig(r=max(RANK, groups), **TARGETS), "flora-auto": FloraConfig(r=RANK, **TARGETS)}
    result = {}
    for name in names:
        if name in configs:
            model = get_peft_model(share_weights(base), configs[name])
            disturb(model)
        else:
            try:
                model = adapt_variant(name, base, TARGETS, LYCORIS_BUDGET, args.seed).model
            except CannotAdapt:
                continue
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        result[name] = model
    return result


def step_of(model: nn.Module, kind: Kind, precision: str, device: str) -> Callable[[], None]:
    """Forward and backward."""
    dtype, autocast = PRECISIONS[precision]
    x = torch.randn(kind.shape, dtype=dtype, device=device, requires_grad=True)
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = model(x)
        torch.autograd.backward(output, torch.ones_like(output), inputs=trained)
        for tensor in trained:
            tensor.grad = None

    return step


def operations(step: Callable[[], None]) -> float:
    """Operations of a step, per layer."""
    step()
    with Counter() as counter:
        step()
    return counter.count / LAYERS


def operations_in_graph(model: nn.Module, kind: Kind, precision: str) -> float:
    """Operations of a compiled step, per layer, as a compiler's backend gets them: not fused yet."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    step_of(torch.compile(model, backend=backend, fullgraph=True), kind, precision, "cpu")()
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    return sum(isinstance(target, torch._ops.OpOverload) and computes(target) for target in targets) / LAYERS


def operations_once(kind: Kind, method: str) -> dict[str, tuple[float, float]]:
    """Operations, and numbers that the host waits for, per layer: of wrapping and of both ways to merge, in float32.
    LoRA cannot merge grouped convolutions."""
    torch.manual_seed(0)
    base = nn.Sequential(*(kind.layer() for _ in range(LAYERS)))
    groups = getattr(base[0], "groups", 1)
    config = {"lora": LoraConfig(r=max(RANK, groups), **TARGETS), "flora-auto": FloraConfig(r=RANK, **TARGETS)}
    with Lists() as lists, Counter() as counter:
        model = get_peft_model(base, config[method])
    counter.reads += lists.reads
    counts = {"wrap": counter}
    disturb(model)
    if method != "lora" or groups == 1:
        for name, options in (("merge_adapter", {}), ("merge_and_unload", {}), ("safe_merge", {"safe_merge": True})):
            again = copy.deepcopy(model)
            with Counter() as counts[name]:
                (again.merge_adapter if name == "merge_adapter" else again.merge_and_unload)(**options)
    return {name: (counter.count / LAYERS, counter.reads / LAYERS) for name, counter in counts.items()}


def measure(name: str, precision: str, args: argparse.Namespace) -> list[Row]:
    """One row per variant."""
    kind = KINDS[name]
    adapted = models(kind, PRECISIONS[precision][0], args.methods, args)
    steps = {method: step_of(model, kind, precision, args.device) for method, model in adapted.items()}
    counts: dict[str, float] = {}
    for method in list(steps):
        try:
            counts[method] = operations(steps[method])
        except RuntimeError as error:  # of types that do not fit together
            print(f"{name}, {precision}: {method} left out: {str(error).splitlines()[0]}")
            del steps[method]
    times = interleaved(steps, args, args.seconds)
    return [
        {
            "measure": precision,
            "workload": name,
            "method": method,
            "operations": round(counts[method], 2),
            "microseconds": statistics.median(own) * 1e3 / LAYERS,
            "of_lora": {
                "operations": counts[method] / counts["lora"] if "lora" in counts else None,
                "microseconds": statistics.median(a / b for a, b in zip(own, times["lora"], strict=True))
                if "lora" in times
                else None,
            },
            **(
                {name: value / LAYERS for name, value in kernels(steps[method]).items()}
                if args.device == "cuda"
                else {}
            ),
        }
        for method, own in times.items()
    ]


def report(rows: list[Row]) -> str:
    """Tables of operations, microseconds and kernels."""
    parts = []
    methods = [name for name in VARIANTS if any(row["method"] == name for row in rows)]
    for value in ("operations", "microseconds", "kernels"):
        cells = {(row["measure"], row["workload"], row["method"]): row for row in rows if value in row}
        lines = []
        for key in dict.fromkeys((precision, name) for precision, name, _ in cells):
            own = [cells.get((*key, method)) for method in methods]
            ratio = cells[*key, "flora-auto"]["of_lora"].get(value) if (*key, "flora-auto") in cells else None
            lines.append(
                [
                    ", ".join(reversed(key)),
                    *("–" if row is None else f"{row[value]:.4g}" for row in own),
                    f"{ratio:.2f}" if ratio else "–",
                ]
            )
        if lines:
            parts.append(f"**{value} per layer**\n\n{table(['', *methods, 'of LoRA'], lines)}")
    return "\n\n".join(parts)


def arguments() -> argparse.Namespace:
    flags = parser((__doc__ or "").partition("\n")[0])
    flags.set_defaults(methods=list(METHODS), workloads=list(KINDS), threads=1)
    flags.add_argument("--kinds", type=names_in(KINDS), default=list(KINDS), metavar="NAME,…")
    flags.add_argument("--precisions", type=names_in(PRECISIONS), default=list(PRECISIONS), metavar="NAME,…")
    flags.add_argument("--seconds", type=float, default=10, help="per kind and precision")
    flags.add_argument("--rounds", type=int)
    flags.add_argument("--table", type=rows_of, metavar="FILE.json", help="print the tables of a results file, and end")
    return flags.parse_args()


def main() -> None:
    args = arguments()
    if args.table is not None:
        print(report(args.table))
        return
    prepare(args)
    results = Results(Path(__file__).stem, args)
    failed = []
    for precision in args.precisions:
        own = each(args.kinds, lambda name, precision=precision: results.replace(measure(name, precision, args)))
        failed += [f"{name}, {precision}" for name in own]
    print(report(results.rows))
    print(f"\nwritten to {results.path}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
