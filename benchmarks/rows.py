"""The results files of the benchmarks: JSON with rows, the machine, the versions and the flags; and tables of them."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flora

Row = dict[str, Any]
LIBRARIES = ("torch", "peft", "transformers", "diffusers", "lycoris-lora")


def rows_of(text: str) -> list[Row]:
    """A flag's type: the rows of a results file."""
    try:
        return json.loads(Path(text).read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"cannot read results from {text}: {error}") from None


class Results:
    """Rows in a JSON file, with the machine, the versions and the flags.

    A new row replaces the old one of the same workload, measure and variant, so a long run can be done in parts.
    """

    def __init__(self, command: str, args: argparse.Namespace) -> None:
        compile = getattr(args, "compile", None) or False
        self.header = {
            "machine": machine(args),
            "versions": versions(),
            "settings": {
                "device": args.device,
                "precision": args.precision,
                "compile": compile,
                "keep_memory": args.keep_memory,
                "tiny": args.tiny,
                "seed": args.seed,
                **({"channels_last": True} if args.channels_last else {}),
            },
        }
        marks = [args.device, *([args.precision] if args.precision != "fp32" else [])]
        marks += ["compile" if compile == "default" else compile] if compile else []
        switches = {"channels-last": args.channels_last, "kept": args.keep_memory, "tiny": args.tiny}
        marks += [name for name, is_set in switches.items() if is_set]
        self.path = args.output or Path(__file__).parent / "results" / f"{'-'.join([command, *marks])}.json"
        self.rows: list[Row] = []
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            self.rows = saved.pop("rows")
            if saved != self.header:
                raise SystemExit(f"{self.path} has results of other versions or settings: choose another --output")

    def replace(self, rows: list[Row]) -> None:
        """Replace the rows of the same workload, measure and variant, and write the file."""

        def key(row: Row) -> tuple[str, ...]:
            return row["workload"], row["measure"], row["method"]

        new = {key(row) for row in rows}
        self.rows = [row for row in self.rows if key(row) not in new] + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**self.header, "rows": self.rows}, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)


def machine(args: argparse.Namespace) -> Row:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str | None]:
    def version(library: str) -> str | None:
        try:
            return metadata.version(library)
        except metadata.PackageNotFoundError:
            return None

    libraries = {library: version(library) for library in LIBRARIES}
    return {**libraries, "torch": torch.__version__, "flora": flora.__version__, "python": platform.python_version()}


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with its first column aligned left, the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
