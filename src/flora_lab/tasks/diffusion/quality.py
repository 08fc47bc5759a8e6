"""How good generated pictures are: CLIP-T, CLIP-I and DINO similarities, Fréchet distances, recognised classes.

Each is measured where its model is named; torchmetrics computes the Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import HEADS
from flora_lab.tasks.models.pretrained import Pretrained, brief

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flora_lab.tasks.diffusion.captions import Captioned
    from flora_lab.tasks.diffusion.denoiser import Denoiser
    from flora_lab.tasks.diffusion.samples import Samples

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of the classifier's inputs


@dataclass
class Quality:
    """The models that judge pictures, and how many pictures they judge."""

    clip: str | None = field(
        default=None, metadata={"help": "a CLIP model, for CLIP-T (prompts) and CLIP-I (data)", "path": True}
    )
    dino: str | None = field(default=None, metadata={"help": "a DINO model, for similarity to the data", "path": True})
    fid: bool = field(default=False, metadata={"help": "Fréchet distance of torch-fidelity's Inception features"})
    classifier: Pretrained | None = field(
        default=None,
        metadata={"help": "a classifier of the data's classes: its own Fréchet distance, and what it sees"},
    )
    images: int = field(
        default=200, metadata={"help": "pictures for Fréchet distances, of test's captions", "least": 2}
    )

    def need_packages(self) -> None:
        """Raise ValueError, before any training, if a package is missing."""
        for name in ("torchmetrics", *(["torch_fidelity"] if self.fid else [])):
            if (self.fid or self.classifier) and find_spec(name) is None:
                raise ValueError(f"task.quality: {name} is not installed: pip install 'flora-peft[diffusion]'")

    def check(self) -> None:
        """Load the models, before any training. Raises ValueError naming one that can't be loaded."""
        _ = self._judges, self.classifier and self._classifier, self.fid and self._inception

    # ------------------------------------------------------------------------------------ similarities of pictures

    def of_prompts(self, made: Tensor, prompts: Sequence[str], examples: Captioned) -> dict[str, float]:
        """CLIP-T: the mean cosine of pictures and their prompts. CLIP-I and DINO: of pictures and up to as many of the
        data's (DreamBooth, Ruiz et al. 2023, section 4.2). ``made`` (n, channels, height, width) from 0 to 1."""
        numbers: dict[str, float] = {}
        if not (self.clip or self.dino) or not made.isfinite().all():
            return dict.fromkeys(self._names(), float("nan"))
        real = pixels(examples, min(len(made), len(examples)))
        if self.clip:
            pictures, texts = self._clip(made, prompts)
            numbers["CLIP-T"] = (pictures * texts).sum(-1).mean().item()
            numbers["CLIP-I"] = (pictures @ self._clip(real, [""] * len(real))[0].mT).mean().item()
        if self.dino:
            numbers["DINO"] = (self._dino(made) @ self._dino(real).mT).mean().item()
        return numbers

    def drift(self, made: Tensor, before: Tensor) -> dict[str, float]:
        """drift DINO: 1 - the mean cosine of a picture and the base model's of the same prompt and seed."""
        if not self.dino:
            return {}
        if not made.isfinite().all():
            return {"drift DINO": float("nan")}
        return {"drift DINO": 1 - (self._dino(made) * self._dino(before)).sum(-1).mean().item()}

    def _names(self) -> list[str]:
        return [*(["CLIP-T", "CLIP-I"] if self.clip else []), *(["DINO"] if self.dino else [])]

    def _clip(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, width) each: unit vectors of pictures and of prompts."""
        model, processor = self._judges["clip"]
        keys = {"return_tensors": "pt", "padding": True, "truncation": True, "do_rescale": False}

        def embed(some: Tensor, texts: Sequence[str]) -> Any:
            return model(**processor(images=list(some), text=list(texts), **keys))

        made = [embed(some, prompts[start : start + BATCH]) for start, some in _batches(images)]
        return tuple(_units([one[name] for one in made]) for name in ("image_embeds", "text_embeds"))

    def _dino(self, images: Tensor) -> Tensor:
        """(n, width): unit vectors, of the class token."""
        model, processor = self._judges["dino"]
        keys = {"return_tensors": "pt", "do_rescale": False}
        return _units([model(**processor(list(some), **keys)).last_hidden_state[:, 0] for _, some in _batches(images)])

    @cached_property
    def _judges(self) -> dict[str, tuple[nn.Module, Any]]:
        """Model and processor by name, loaded once. Raises ValueError naming the model."""
        from transformers import AutoImageProcessor, AutoModel, AutoProcessor

        made = {}
        for name, kind in (("clip", AutoProcessor), ("dino", AutoImageProcessor)):
            if source := getattr(self, name):
                try:
                    model = AutoModel.from_pretrained(source).eval().requires_grad_(False)
                    made[name] = model, kind.from_pretrained(source)
                except Exception as error:  # a model's own code may raise anything
                    raise ValueError(f"task.quality.{name}={source}: {brief(error)}") from error
        return made

    # --------------------------------------------------------------------------------------- many pictures at once

    def of_data(self, model: Denoiser, examples: Captioned, keys: Samples) -> dict[str, float]:
        """FID, and FD in the classifier's features: distances of generated pictures from the data, over the captions of
        the data in turn. recognised: the share of pictures in which the classifier sees the class of the caption."""
        if not (self.fid or self.classifier):
            return {}
        captions = [examples.caption(index % len(examples)) for index in range(self.images)]
        made = _coloured(model.sample(captions, range(self.images), keys))
        names = ["FID"] * self.fid + ["FD", "recognised"] * (self.classifier is not None)
        if not made.isfinite().all():
            return dict.fromkeys(names, float("nan"))
        real, numbers = _coloured(pixels(examples, len(examples))), {}
        if self.fid:
            numbers["FID"] = _frechet(self._inception, real, made)
        if self.classifier:
            features = _features(self._classifier)
            numbers["FD"] = _frechet(_distance(features), real, made)
            if model.frozen.classes:
                seen = [self._classifier(_normal(some)).logits.argmax(-1).tolist() for _, some in _batches(made)]
                wanted = [model.frozen.classes.index(caption) for caption in captions]
                numbers["recognised"] = sum(map(int.__eq__, chain(*seen), wanted)) / len(wanted)
        return numbers

    @cached_property
    def _inception(self) -> Any:
        """torchmetrics' FID, whose weights torch-fidelity downloads."""
        try:
            return _distance(2048)
        except Exception as error:  # of the network's, the disk's and torch's many classes
            raise ValueError(f"task.quality.fid: Inception can't be loaded: {brief(error)}") from error

    @cached_property
    def _classifier(self) -> nn.Module:
        return self.classifier.load("AutoModelForImageClassification", ()).eval().requires_grad_(False)


def _distance(features: int | nn.Module) -> Any:
    """torchmetrics' Fréchet distance in the features of Inception (their number), or of a module."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(features, normalize=True)


def _frechet(metric: Any, real: Tensor, made: Tensor) -> float:
    metric.reset()
    for some, is_real in ((real, True), (made, False)):
        for _, batch in _batches(some):
            metric.update(batch, real=is_real)
    return metric.compute().item()


def _features(model: nn.Module) -> nn.Module:
    """What a classifier's output layer gets, as a module for torchmetrics: from pictures, 0 to 1, to (n, width)."""
    import torch

    head = next(getattr(model, name) for name in HEADS if hasattr(model, name))

    class Features(torch.nn.Module):
        num_features = head.in_features

        def forward(self, pictures: Tensor) -> Tensor:
            seen: list[Tensor] = []
            handle = head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
            try:
                model(_normal(pictures))
            finally:
                handle.remove()
            return seen[0]

    return Features()


def pixels(examples: Captioned, count: int) -> Tensor:
    """The first ``count`` pictures of the data, (count, channels, size, size) from 0 to 1."""
    import torch

    return torch.stack([examples[index]["pixel_values"] for index in range(count)]) / 2 + 0.5


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _normal(images: Tensor) -> Tensor:
    import torch

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def _batches(images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some pictures at a time, with the number of the first."""
    return ((start, images[start : start + BATCH]) for start in range(0, len(images), BATCH))


def _units(parts: Sequence[Tensor]) -> Tensor:
    """All rows, as unit vectors."""
    import torch
    import torch.nn.functional as F

    return F.normalize(torch.cat(list(parts)), dim=-1)
