"""What goes wrong when it is tried often: FLoRA, and PEFT's LoRA beside it. Writes the table of docs/reliability.md.

    python benchmarks/reliability.py                    # some minutes on two cores
    python benchmarks/reliability.py --kinds kill --tries 20
    python benchmarks/reliability.py --output docs/reliability.md

A kind is a row of `KINDS`, with a function of `faults.py`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from faults import configs, headers, imports, kill, not_finite, threads, trained, unmerge

METHODS = {"flora": "FLoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class Kind:
    """A row of the table. ``tries``: how many by default."""

    title: str
    run: Callable[[str, int], Iterator[bool]]
    tries: int


KINDS = {
    "threads": Kind("concurrent calls from four threads", threads, 400),
    "unmerge": Kind("merged, changed, unmerged: to the bit", unmerge, 100),
    "trained": Kind("base weight trained while merged: kept or refused", trained, 100),
    "finite": Kind("not merged if not finite", not_finite, 100),
    "kill": Kind("`kill -9` in `save_pretrained`", kill, 100),
    "headers": Kind("changed bytes in the safetensors header", headers, 500),
    "configs": Kind("changed values in the config", configs, 500),
    "imports": Kind("`import lora`: exact or refused", imports, 100),
}


def count(kind: Kind, method: str, tries: int) -> tuple[int, int]:
    """(tried, passed)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = list(kind.run(method, tries))
    return len(results), sum(results)


def table(rows: dict[str, dict[str, tuple[int, int]]]) -> str:
    lines = ["| what is tried | FLoRA: tried | passed | LoRA: tried | passed |", "|---|---:|---:|---:|---:|"]
    for name, found in rows.items():
        cells = [str(number) if tried else "–" for tried, passed in found.values() for number in (tried, passed)]
        lines.append(f"| {KINDS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of: %(default)s")
    parser.add_argument("--tries", type=int, help="of each kind; default: as many as it needs")
    parser.add_argument("--output", type=Path, help="write the table between the marks of this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for name in args.kinds.split(","):
        kind = KINDS[name]
        rows[name] = {method: count(kind, method, args.tries or kind.tries) for method in METHODS}
        print(f"{name}: {rows[name]}", flush=True)
    print(table(rows))
    if args.output:
        before, start, rest = args.output.read_text().partition("<!-- table -->\n")
        args.output.write_text(f"{before}{start}{table(rows)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
