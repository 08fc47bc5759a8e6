"""Everything that needs a GPU, in three parts of about nine minutes each; every part writes its rows as it goes.

    for part in 1 2 3; do python benchmarks/gpu.py --part $part; done

The rows go to ``benchmarks/results`` (another folder: ``--folder``), in files that name device, precision and mode; no
two parts write the same file. Run a part again to go on: new rows replace the old ones of the same workload, measure
and variant. Nothing of this repository needs to be installed. Pure-Python packages that the machine lacks come from a
folder ``wheels`` beside ``benchmarks``, if there is one.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
WHEELS = HERE.parent / "wheels"
COMPARED = "floor,full,lora,locon,locon-bypass,flora-auto,flora-factored,flora-merged"
FEW = "floor,lora,flora-auto"
SMALL = "conv-64,conv-192,conv-320,depthwise,block-768,experts,bert-base"
GRACE = 15  # seconds to end by oneself
PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a machine's own would give warnings, which are errors here


class Step(NamedTuple):
    """A script of this folder, or "pytest", with its flags and variables of its environment."""

    script: str
    flags: tuple[str, ...]
    environment: Mapping[str, str] = {}

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), self.script, *self.flags])


def speed(
    precision: str,
    workloads: str,
    *flags: str,
    methods: str = COMPARED,
    measure: str = "step,inference",
    environment: Mapping[str, str] = {},
) -> Step:
    """One call of speed.py."""
    own = ("--precision", precision, "--workloads", workloads, "--methods", methods, "--measure", measure)
    return Step("speed.py", (*own, "--seconds", "8", *flags), environment)


def tests(name: str, *flags: str) -> Step:
    """Tests on the GPU; which of them failed is in ``name``.xml."""
    common = ("-q", "-rf", "-W", "default", "-p", "on_the_gpu", "--maxfail", "50", "--junitxml", f"{name}.xml")
    return Step("pytest", (*common, *flags), PLUGINS)


# The steps of each part; the most telling come first.
PARTS: dict[int, list[Step]] = {
    1: [
        tests("pool", "tests/flora/test_pool_exact.py", "tests/flora/test_pool.py"),
        Step("launches.py", ("--seconds", "3")),
        speed("bf16", f"{SMALL},block-4096,convnextv2-tiny,unet"),
        Step("memory.py", ("--precision", "bf16", "--methods", FEW)),
    ],
    2: [
        speed(
            "bf16-base",
            f"{SMALL},block-4096",
            methods="floor,full,lora,flora-auto,flora-factored",
            measure="step,inference,token,decode",
        ),
        speed("bf16", "block-768,conv-192,block-4096", "--compile", methods=FEW, measure="step"),
        speed("bf16", "block-768,block-4096", "--compile", "reduce-overhead", methods=FEW, measure="step"),
        Step("memory.py", ("--precision", "bf16-base", "--workloads", f"{SMALL},block-4096", "--methods", FEW)),
    ],
    3: [
        speed("fp32", f"{SMALL},block-4096", methods=FEW, measure="step,wrap,merge"),
        speed("bf16", "conv-192,conv-320", "--channels-last", methods=FEW, measure="step"),
        speed(
            "bf16",
            "conv-192,block-768",
            methods="floor,lora,locon,locon-bypass",
            measure="step",
            environment={"LYCORIS_KERNEL_BACKEND": "torch"},  # by default it takes its Triton kernels
        ),
        Step("initialize.py", ("--start", "gradient", "--tokens", "1024")),
        Step("initialize.py", ("--start", "activations", "--tokens", "1024")),
        tests(
            "contract",
            *("-p", "xdist", "-n", "8", "tests/flora/test_contract.py"),
            *("--deselect", "tests/flora/test_contract.py::test_exports_to_onnx"),  # it compares with numpy, on a CPU
        ),
    ],
}


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--part", type=int, choices=PARTS, required=True)
    flags.add_argument("--folder", type=Path, default=HERE / "results")
    flags.add_argument("--seconds", type=float, default=510, help="no step runs beyond this time")
    flags.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try this script")
    flags.add_argument("--tiny", action="store_true", help="small shapes, for a quick trial")
    args = flags.parse_args()
    end = time.monotonic() + args.seconds
    failed = []
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as packages:
        for wheel in sorted(WHEELS.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(packages)
        for step in PARTS[args.part]:
            left = end - time.monotonic()
            print(f"\n=== {step} ({left:.0f} s left)", flush=True)
            if trouble := run(step, command_of(step, args), left, packages):
                failed.append(f"{step} ({trouble})")
    print("\nnot finished: " + ("\n  ".join(["", *failed]) or "nothing"))
    sys.exit(bool(failed))


def command_of(step: Step, args: argparse.Namespace) -> list[str]:
    if step.script == "pytest":
        place = [str(args.folder / flag) if flag.endswith(".xml") else flag for flag in step.flags]
        return [sys.executable, "-m", "pytest", *place]
    tiny = ["--tiny"] if args.tiny else []
    output = args.folder / name_of(step, args)
    own = [sys.executable, str(HERE / step.script), "--device", args.device]
    return [*own, *step.flags, *tiny, "--output", str(output)]


def run(step: Step, command: list[str], seconds: float, packages: str) -> str | None:
    """Run a step; why it did not finish, or None. At the end of its time it is interrupted, not killed: pytest then
    still says what failed."""
    if seconds <= 0:
        return "not started"
    paths = [str(HERE), str(HERE.parent / "src"), packages, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **step.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(command, cwd=HERE.parent, env=environment) as process:
        try:
            code = process.wait(seconds)
            return f"exit status {code}" if code else None
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return "out of time"


def name_of(step: Step, args: argparse.Namespace) -> str:
    """The results file: as the script itself would name it, and the same folder for all."""
    marks = [step.script.removesuffix(".py"), args.device]
    if "--precision" in step.flags and (precision := step.flags[step.flags.index("--precision") + 1]) != "fp32":
        marks.append(precision)
    if "--compile" in step.flags:
        mode = (*step.flags, "--")[step.flags.index("--compile") + 1]
        marks.append("compile" if mode.startswith("--") else mode)
    marks += [flag.removeprefix("--") for flag in ("--channels-last",) if flag in step.flags]
    marks += [f"{name.partition('_')[0].lower()}-{value}" for name, value in step.environment.items()]
    return "-".join([*marks, *(["tiny"] if args.tiny else [])]) + ".json"


if __name__ == "__main__":
    main()
