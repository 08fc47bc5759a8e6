"""Speed of FLoRA, other adapters, full fine-tuning and the frozen model, at equal trainable parameters, in one run.

    python benchmarks/speed.py                                  # everything: forty minutes on two cores
    python benchmarks/speed.py --workloads conv-64,bert-base --measure step --seconds 60
    python benchmarks/speed.py --table benchmarks/results/speed-cpu.json

The floor is the step of the frozen model, with gradients flowing to its input. A variant's overhead is its step minus
the floor. In each round every variant makes one step; ratios are taken within a round, medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

from kernel_counts import kernels
from measure import (
    adapted_models,
    case_of,
    compile_model,
    each,
    inference,
    interleaved,
    milliseconds,
    names_in,
    parser,
    prepare,
    quartiles,
    ranks,
    training_step,
)
from peft import LoraConfig, PeftConfig, get_peft_model
from rows import Results, Row, rows_of, table
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from variants import VARIANTS, Targets, disturb, lora_parameters
from workloads import GROUPS, WORKLOADS, Case, Workload

from flora import FloraConfig
from flora.tuner.live import one_call
from flora_lab.methods import AdaptedModel
from flora_lab.methods.common import share_weights

MEASURES = ("step", "inference", "token", "decode", "wrap", "merge")
INFERENCE_PART = 0.2  # of the steps' seconds
REPEATS = 5  # of wrapping and merging
DECODERS = ("block-768", "block-4096")  # "token": one token; "decode": one token within a call of `generate`
CLOSE_ENOUGH = 1.03  # "auto" may take this much of the faster fixed execution's time
CONFIGS: dict[str, Callable[[Targets, int, int], PeftConfig]] = {  # what a user gives to get_peft_model
    "lora": lambda targets, rank, budget: LoraConfig(r=rank, **targets),
    "flora-auto": lambda targets, rank, budget: FloraConfig(budget=budget, **targets),
}


# ------------------------------------------------------------------------------------------------- step, inference


def time_methods(name: str, workload: Workload, case: Case, args: argparse.Namespace) -> list[Row]:
    """Rows of the training step and of inference; all models are in memory at once."""
    models = dict(adapted_models(workload, case, args))
    run = {m: compile_model(m, a.model, args.compile) if args.compile else a.model for m, a in models.items()}
    rows: list[Row] = []
    if "step" in args.measure:
        steps = {method: training_step(case, a.model, run[method], args) for method, a in models.items()}
        rows += rows_of_times("step", name, workload, models, interleaved(steps, args, args.seconds))
        if args.device == "cuda":
            for row in rows:
                row |= kernels(steps[row["method"]])
    for adapted in models.values():
        adapted.model.eval()
    for measure in ("inference", "token", "decode"):
        if measure not in args.measure or (measure != "inference" and name not in DECODERS):
            continue
        own = case if measure == "inference" else one_token(case)
        forwards = {method: inference(own, run[method], args) for method in models}
        with one_call() if measure == "decode" else nullcontext():
            times = interleaved(forwards, args, args.seconds * INFERENCE_PART)
            own_rows = rows_of_times(measure, name, workload, models, times)
            if args.device == "cuda":
                own_rows = [row | kernels(forwards[row["method"]]) for row in own_rows]
        rows += own_rows
    return rows


def one_token(case: Case) -> Case:
    """The case with one sample of one position."""
    return replace(case, batch=tree_map_only(Tensor, lambda tensor: tensor.detach()[:1, :1], case.batch), gradient=None)


def rows_of_times(
    measure: str, name: str, workload: Workload, models: dict[str, AdaptedModel], times: dict[str, list[float]]
) -> list[Row]:
    """Rows with quartiles, and ratios to the floor and to LoRA's overhead."""
    over_floor = {
        method: statistics.median(own / base for own, base in zip(times[method], times["floor"], strict=True))
        for method in times
    }
    of_lora = over_floor.get("lora", 1) - 1
    return [
        {
            "measure": measure,
            "workload": name,
            "group": workload.group,
            "method": method,
            "parameters": models[method].parameters,
            "ranks": ranks(models[method]),
            **quartiles(times[method]),
            "over_floor": over_floor[method],
            "overhead": over_floor[method] - 1,
            "over_lora": (over_floor[method] - 1) / of_lora if of_lora else None,
        }
        for method in times
    ]


# ------------------------------------------------------------------------------------------------- wrap, merge


def time_wrapping(name: str, workload: Workload, case: Case, args: argparse.Namespace) -> list[Row]:
    """Rows of ``get_peft_model`` alone; for FLoRA, it solves for the ranks too."""
    rank = workload.lora_rank(args.tiny)
    parameters = lora_parameters(case.model, workload.targets, rank)
    times: dict[str, list[float]] = {method: [] for method in CONFIGS}
    for _ in range(REPEATS + 1):
        for method, config in CONFIGS.items():
            model, chosen = share_weights(case.model), config(workload.targets, rank, parameters)
            times[method].append(milliseconds(lambda m=model, c=chosen: get_peft_model(m, c), args.device))
    head = {"measure": "wrap", "workload": name, "group": workload.group}
    return [{**head, "method": method, **quartiles(own[1:])} for method, own in times.items()]


def time_merging(name: str, workload: Workload, case: Case, args: argparse.Namespace) -> list[Row]:
    """Rows of ``merge_and_unload``, with two checks: the merged model's forward time relative to the base model's, and
    whether every module has its original class again."""
    rank = workload.lora_rank(args.tiny)
    parameters = lora_parameters(case.model, workload.targets, rank)
    times: dict[str, list[float]] = {method: [] for method in CONFIGS}
    merged_models: dict[str, nn.Module] = {"base": copy.deepcopy(case.model)}
    for _ in range(REPEATS + 1):
        for method, config in CONFIGS.items():
            chosen = config(workload.targets, rank, parameters)
            model = get_peft_model(copy.deepcopy(case.model), chosen)
            disturb(model)

            def merge(method: str = method, model: nn.Module = model) -> None:
                merged_models[method] = model.merge_and_unload()

            times[method].append(milliseconds(merge, args.device))
    forwards = {which: inference(case, model.eval(), args) for which, model in merged_models.items()}
    forward_times = interleaved(forwards, args, args.seconds * INFERENCE_PART)
    classes = [type(module) for module in case.model.modules()]
    return [
        {
            "measure": "merge",
            "workload": name,
            "group": workload.group,
            "method": method,
            **quartiles(own[1:]),
            "forward_over_base": statistics.median(
                a / b for a, b in zip(forward_times[method], forward_times["base"], strict=True)
            ),
            "classes_kept": [type(module) for module in merged_models[method].modules()] == classes,
        }
        for method, own in times.items()
    ]


# ------------------------------------------------------------------------------------------------- tables


def report(rows: list[Row]) -> str:
    """All tables, as Markdown."""
    parts = [ratios(rows, measure, group) for measure in MEASURES[:4] for group in GROUPS]
    parts += [autos_choice(rows), wrapping_and_merging(rows)]
    return "\n\n".join(filter(None, parts))


def ratios(rows: list[Row], measure: str, group: str) -> str:
    """One line per variant, one column per workload: "overhead % (ratio to LoRA's overhead)"."""
    cells = {
        (row["method"], row["workload"]): row for row in rows if row["measure"] == measure and row["group"] == group
    }
    names = in_order(WORKLOADS, {workload for _, workload in cells})
    if not names:
        return ""

    def cell(method: str, name: str) -> str:
        row = cells.get((method, name))
        if row is None:
            return "–"
        if method == "floor":
            return f"{row['median_ms']:.4g} ms"
        ratio = "" if row["over_lora"] is None else f" ({row['over_lora']:.2f})"
        return f"{100 * row['overhead']:.1f} %{ratio}"

    lines = [[method, *(cell(method, name) for name in names)] for method in in_order(VARIANTS, {m for m, _ in cells})]
    caption = f"**{measure.capitalize()}, {GROUPS[group]}**: overhead over the floor (and relative to LoRA's)"
    return f"{caption}\n\n{table(['method', *names], lines)}"


def autos_choice(rows: list[Row]) -> str:
    """Whether "auto" takes at most ``CLOSE_ENOUGH`` times the time of the faster of "factored" and "merged"."""
    step = {(row["workload"], row["method"]): row["over_floor"] for row in rows if row["measure"] == "step"}
    lines, held = [], 0
    for name in WORKLOADS:
        if any((name, f"flora-{execution}") not in step for execution in ("auto", "factored", "merged")):
            continue
        faster = min(("factored", "merged"), key=lambda execution: step[name, f"flora-{execution}"])
        ratio = step[name, "flora-auto"] / step[name, f"flora-{faster}"]
        held += ratio <= CLOSE_ENOUGH
        lines.append([name, faster, f"{ratio:.3f}", "yes" if ratio <= CLOSE_ENOUGH else "no"])
    if not lines:
        return ""
    body = table(["workload", "faster execution", "auto / faster", f"at most {CLOSE_ENOUGH}"], lines)
    return f"**Auto's choice**: {held} of {len(lines)} workloads\n\n{body}"


def wrapping_and_merging(rows: list[Row]) -> str:
    lines = []
    for measure in ("wrap", "merge"):
        own = [row for row in rows if row["measure"] == measure]
        for row in sorted(own, key=lambda row: list(WORKLOADS).index(row["workload"])):
            forward = f"{row['forward_over_base']:.3f}" if measure == "merge" else ""
            classes = ("yes" if row["classes_kept"] else "NO") if measure == "merge" else ""
            lines.append([row["workload"], measure, row["method"], f"{row['median_ms']:.4g}", forward, classes])
    if not lines:
        return ""
    head = ["workload", "measure", "method", "ms", "merged forward / base", "original classes"]
    return f"**Wrapping and merging**\n\n{table(head, lines)}"


def in_order(names: Iterable[str], present: set[str]) -> list[str]:
    return [name for name in names if name in present]


def print_times(rows: list[Row]) -> None:
    for row in rows:
        extra = f" {row['over_floor']:.3f} of the floor" if "over_floor" in row else ""
        times = f"{row['median_ms']:10.3f} ms ({row['q1_ms']:.3f} to {row['q3_ms']:.3f}, {row['rounds']} rounds)"
        print(f"{row['measure']:10}{row['method']:16}{times}{extra}")


# ------------------------------------------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    flags = parser((__doc__ or "").partition("\n")[0])
    flags.add_argument(
        "--measure", type=names_in(MEASURES), default=list(MEASURES), metavar="NAME,…", help=",".join(MEASURES)
    )
    flags.add_argument("--rounds", type=int, help="number of rounds, instead of as many as fit into --seconds")
    flags.add_argument("--seconds", type=float, default=150, help="time for the steps of one workload")
    flags.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead"],
        help="torch.compile every model, in this mode",
    )
    flags.add_argument("--table", type=rows_of, metavar="FILE.json", help="only print the tables of a results file")
    args = flags.parse_args()
    args.methods = in_order(VARIANTS, {"floor", *args.methods})
    return args


def main() -> None:
    args = arguments()
    if args.table:
        print(report(args.table))
        return
    prepare(args)
    results = Results("speed", args)
    sections: list[tuple[set[str], Callable[..., list[Row]]]] = [
        ({"step", "inference", "token", "decode"}, time_methods),
        ({"wrap"}, time_wrapping),
        ({"merge"}, time_merging),
    ]

    def measure(name: str) -> None:
        case = case_of(WORKLOADS[name], args)
        for measures, time_section in sections:
            if measures & set(args.measure):
                rows = time_section(name, WORKLOADS[name], case, args)
                print_times(rows)
                results.replace(rows)

    failed = each(args.workloads, measure)
    print(f"\n{report([row for row in results.rows if row['workload'] in args.workloads])}")
    print(f"\nwritten to {results.path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
