"""The benchmark commands, on tiny models: every workload, the methods that need no package of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = ["floor", "lora", "authors", "flora-auto", "flora-factored", "flora-merged", "flora-k3", "flora-all"]


def run(command: str, *flags: str) -> str:
    line = [sys.executable, BENCHMARKS / f"{command}.py", "--tiny", "--threads", "1", "--methods", ",".join(METHODS)]
    return subprocess.run([*line, *flags], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", ["speed", "memory"])
def test_every_workload_runs_tiny(command, tmp_path):
    file = tmp_path / "rows.json"
    printed = run(command, "--output", str(file), *(["--rounds", "1"] if command == "speed" else []))
    saved = json.loads(file.read_text())
    rows = saved["rows"]
    workloads = {row["workload"] for row in rows}
    assert len(workloads) == 10 and all(name in printed for name in workloads)
    assert saved["machine"]["threads"] == 1 and saved["versions"]["torch"]
    for name in workloads:
        own = {row["method"]: row for row in rows if row["workload"] == name and "parameters" in row}
        assert own["floor"]["parameters"] == 0
        assert all(r["parameters"] <= own["lora"]["parameters"] for m, r in own.items() if m.startswith("flora"))
    if command == "speed":
        assert all(row["classes_kept"] for row in rows if row["measure"] == "merge")
