"""Turn a full fine-tune into an adapter: the difference of two checkpoints at the best ranks of a size:

    python examples/extract.py BASE TUNED OUTPUT 0.01

BASE and TUNED are folders or names on the hub. No model is in memory: the weights are read one at a time.
"""

import sys
from pathlib import Path

from flora.convert import export_lora, extract


def main(base: str, tuned: str, output: str, budget: str = "0.01") -> None:
    """The adapter, and the same as a plain LoRA for programs without flora."""
    size = float(budget) if "." in budget else int(budget)
    print(extract(base, tuned, Path(output, "adapter"), budget=size))
    print(export_lora(Path(output, "adapter"), Path(output, "lora")))


if __name__ == "__main__":
    main(*sys.argv[1:])
