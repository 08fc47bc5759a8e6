"""PEFT's own tests of custom models, with its methods swapped for FLoRA: docs/reliability.md says what comes out.

    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xf peft-0.21.2.tar.gz
    python benchmarks/peft_suite.py peft-0.21.2 -q --tb=line        # then pytest's arguments

PEFT's table has a row per method and model. Each model's targets are kept, once, and options of other methods dropped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ANCHOR = "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = ["  # the table of single adapters ends before it
SWAP = """
def _for_flora(cases):
    from flora import FloraConfig

    targets = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
    rows = {}
    for _, model, _, options, *_ in cases:
        kept = {key: options[key] for key in targets if key in options}
        rank = {"r": options["r"]} if isinstance(options.get("r"), int) else {}
        if "target_modules" in kept or "target_parameters" in kept:
            rows.setdefault((model, str(sorted(kept.items()))), (model, {**kept, **rank}))
    return [(f"{model} {n} FLORA", model, FloraConfig, kept) for n, (model, kept) in enumerate(rows.values())]


TEST_CASES = _for_flora(TEST_CASES)
"""


def main(source: Path, arguments: list[str]) -> int:
    tests = source / "tests"
    table = tests / "test_custom_models.py"
    if not table.is_file():
        raise SystemExit(f"{table}: no such file; the folder of PEFT's sources is needed")
    text = table.read_text()
    if text.count(ANCHOR) != 1:
        raise SystemExit(f"{table}: its table is not where it was in PEFT 0.21.2")
    (tests / "test_swapped.py").write_text(text.replace(ANCHOR, SWAP + "\n\n" + ANCHOR))
    (source / "flora.ini").write_text("[pytest]\n")  # without PEFT's coverage and markers
    command = ["pytest", "-c", "flora.ini", "--rootdir=.", "tests/test_swapped.py", "-k", "FLORA", *arguments]
    # its models come from no hub
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=source, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of PEFT's sources; what follows is for pytest")
    options, others = parser.parse_known_args()
    sys.exit(main(options.source.resolve(), others))
