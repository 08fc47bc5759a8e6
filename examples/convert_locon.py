"""Read a LoCon file of LyCORIS or kohya, make it smaller, and write it for ComfyUI and for PEFT:

    python examples/convert_locon.py style.safetensors UNET OUTPUT

UNET is the model that the file adapts: a folder with its config.json. Its weights are not read.
"""

import sys
from pathlib import Path

from flora.convert import compress, export_diffusers, export_locon, import_locon


def main(file: str, unet: str, output: str) -> None:
    """All steps. Only ``compress`` approximates: it keeps 99 % of each layer's squared norm."""
    folder = Path(output)
    print(import_locon(file, unet, folder / "adapter"))
    print(compress(folder / "adapter", folder / "smaller", energy=0.99))
    print(export_locon(folder / "smaller", folder / "comfyui.safetensors"))
    print(export_locon(folder / "smaller", folder / "kohya.safetensors", folded=True))
    print(export_diffusers(folder / "smaller", folder / "diffusers"))


if __name__ == "__main__":
    main(*sys.argv[1:])
