"""Pictures that a diffusion model makes of fixed prompts with fixed seeds: during training, and of the trained model
beside its base."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.files import replace_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from flora_lab.tasks.diffusion.captions import Captioned
    from flora_lab.tasks.diffusion.denoiser import Denoiser
    from flora_lab.tasks.text_to_image import TextToImage

THUMBNAIL = 96  # pixels: the longest side of a picture in a row


@dataclass
class Samples:
    """Which pictures are made, and how."""

    prompts: list[str] = field(default_factory=list, metadata={"help": "prompts to make pictures of"})
    drift_prompts: list[str] = field(
        default_factory=list, metadata={"help": "prompts that the data are not about: how far the base model drifts"}
    )
    each: int = field(default=1, metadata={"help": "pictures of each prompt, of seeds 0, 1, …", "least": 1})
    steps: int = field(default=30, metadata={"help": "of the sampler", "least": 1})
    guidance: float = field(default=7.5, metadata={"help": "of pipelines; 1: none", "least": 0})
    batch: int = field(default=4, metadata={"help": "pictures at a time", "least": 1})
    every_epoch: bool = field(
        default=False, metadata={"help": "also during training, at the first evaluation after each epoch"}
    )

    def __post_init__(self):
        for name in ("prompts", "drift_prompts"):
            if any(not prompt.strip() for prompt in getattr(self, name)):
                raise ValueError(f"task.samples.{name}={getattr(self, name)}: expected no empty prompt")

    def pairs(self, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
        """Each prompt with each seed."""
        return [prompt for prompt in prompts for _ in range(self.each)], list(range(self.each)) * len(prompts)


def judge_samples(
    model: nn.Module, base: nn.Module, examples: Captioned, task: TextToImage, folder: Path
) -> dict[str, Any]:
    """The part of a row about the pictures that a trained model and its base make: "samples" and further numbers of
    "test". They are also left in FOLDER/final and FOLDER/base.

    drift: the root mean square of what changes in a pixel (from 0 to 1) of the pictures of ``drift_prompts``.
    """
    keys = task.samples
    tuned, base = plain(model), plain(base).to(plain(model).device)
    prompts, seeds = keys.pairs([*keys.prompts, *keys.drift_prompts])
    numbers, row = {}, {}
    if prompts:
        made, before = tuned.sample(prompts, seeds, keys), base.sample(prompts, seeds, keys)
        write(made, prompts, seeds, folder / "final")
        write(before, prompts, seeds, folder / "base")
        row["samples"] = {
            "prompts": prompts,
            "seeds": seeds,
            "images": [_encoded(picture) for picture in made],
            "base": [_encoded(picture) for picture in before],
        }
        if keys.drift_prompts:
            first = len(keys.prompts) * keys.each
            numbers["drift"] = (made - before)[first:].square().mean().sqrt().item()
            numbers |= task.quality.drift(made[first:], before[first:])
        if first := len(keys.prompts) * keys.each:
            numbers |= task.quality.of_prompts(made[:first], prompts[:first], examples)
    numbers |= task.quality.of_data(tuned, examples, keys)
    row["test"] = {name: value if math.isfinite(value) else math.nan for name, value in numbers.items()}
    return row


def plain(model: nn.Module) -> Denoiser:
    """The denoiser without the wrappers of PEFT and of training in several processes."""
    from flora_lab.tasks.diffusion.denoiser import Denoiser

    return next(module for module in model.modules() if isinstance(module, Denoiser))


def write(pictures: Tensor, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """One PNG per picture, named by place, prompt and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        words = re.sub(r"\W+", "-", prompt).strip("-")[:60]
        with replace_file(folder / f"{place:02d}-{words}-{seed}.png") as file:
            image(picture).save(file, "PNG")


def image(picture: Tensor) -> Image:
    """(channels, height, width) from 0 to 1; black where it is not finite."""
    from torchvision.transforms.v2.functional import to_pil_image

    return to_pil_image((picture.nan_to_num(0.0, 0.0, 0.0) * 255).round().byte())


def _encoded(picture: Tensor) -> str:
    """A thumbnail for a row, a JPEG in base64."""
    small, file = image(picture).convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=90, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()
