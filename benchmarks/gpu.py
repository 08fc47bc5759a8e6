"""Everything that needs a GPU, in three parts of about nine minutes each; every part writes its rows as it goes.

    for part in 1 2 3; do python benchmarks/gpu.py --part $part; done

The rows go to ``benchmarks/results`` (another folder: ``--folder``), in files that name device, precision and mode.
Run a part again to go on: new rows replace the old ones of the same workload, measure and variant.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
COMPARED = "floor,full,lora,locon,locon-bypass,flora-auto,flora-factored,flora-merged"
FEW = "floor,lora,flora-auto"
SMALL = "conv-64,conv-192,conv-320,depthwise,block-768,experts,bert-base"


def speed(
    precision: str, *flags: str, methods: str = COMPARED, measure: str = "step,inference", seconds: int = 8
) -> list:
    """One call of speed.py."""
    common = ["--precision", precision, "--methods", methods, "--measure", measure, "--seconds", str(seconds)]
    return ["speed.py", *common, *flags]


# The steps of each part: a script of this folder and its flags, or a module and its flags. The most telling come first.
PARTS: dict[int, list[list[str]]] = {
    1: [
        ["launches.py", "--seconds", "3"],
        speed("bf16", "--workloads", f"{SMALL},block-4096"),
        speed("bf16-base", "--workloads", "block-768,block-4096,bert-base", measure="step,inference,token,decode"),
    ],
    2: [
        speed("bf16", "--compile", "--workloads", "block-768,conv-192", methods=FEW, measure="step"),
        speed("bf16", "--compile", "reduce-overhead", "--workloads", "block-768", methods=FEW, measure="step"),
        speed("fp32", "--workloads", SMALL, methods=FEW, measure="step,wrap,merge"),
        speed("bf16", "--workloads", "convnextv2-tiny,unet", methods=FEW),
    ],
    3: [
        ["memory.py", "--precision", "bf16", "--methods", FEW],
        ["memory.py", "--precision", "bf16-base", "--workloads", "block-768,block-4096,bert-base", "--methods", FEW],
        ["pytest", "-q", "-x", "tests/flora/test_pool.py", "tests/flora/test_contract.py", "-p", "on_the_gpu"],
    ],
}


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--part", type=int, choices=PARTS, required=True)
    flags.add_argument("--folder", type=Path, default=HERE / "results")
    flags.add_argument("--seconds", type=float, default=540, help="start no step after this time")
    flags.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try this script")
    flags.add_argument("--tiny", action="store_true", help="small shapes, for a quick trial")
    args = flags.parse_args()
    end = time.monotonic() + args.seconds
    failed = []
    for script, *options in PARTS[args.part]:
        left = end - time.monotonic()
        print(f"\n=== {script} {' '.join(options)} ({left:.0f} s left)", flush=True)
        if script == "pytest":
            command = [sys.executable, "-m", "pytest", *options]
        else:
            command = [sys.executable, str(HERE / script), "--device", args.device, *options]
            command += ["--tiny"] if args.tiny else []
            command += ["--output", str(args.folder / name_of(script, [*options, *command[-1:]], args.device))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        try:
            done = subprocess.run(command, cwd=HERE.parent, env=environment, timeout=max(left, 1))
            failed += [script] if done.returncode else []
        except subprocess.TimeoutExpired:
            failed.append(f"{script} (out of time)")
    print(f"\nnot finished: {', '.join(failed) or 'nothing'}")
    sys.exit(bool(failed))


def name_of(script: str, options: list[str], device: str) -> str:
    """The results file: as the script itself would name it, and the same folder for all."""
    marks = [script.removesuffix(".py"), device]
    for flag in ("--precision", "--compile"):
        if flag in options:
            value = options[options.index(flag) + 1]
            marks.append("compile" if value.startswith("--") else value)
    return "-".join([*marks, *(["tiny"] if "--tiny" in options else [])]) + ".json"


if __name__ == "__main__":
    main()
