"""How good generated pictures are: CLIP-T, CLIP-I and DINO similarities, Fréchet distances, recognised classes.

Each is measured where its model is named; torchmetrics computes the Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import islice, repeat
from operator import eq
from typing import TYPE_CHECKING, Any

from flora_lab.lines import counted
from flora_lab.tasks.models.pretrained import Pretrained, brief

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flora_lab.tasks.diffusion.captions import Captioned
    from flora_lab.tasks.diffusion.denoiser import Denoiser
    from flora_lab.tasks.diffusion.judges import Classifier
    from flora_lab.tasks.diffusion.samples import Samples

BATCH = 32  # pictures that are held and judged at a time, but for those of the prompts


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

    def check(self, examples: Captioned, prompts: Sequence[str], classes: Sequence[str]) -> None:
        """Let each model judge a picture, twice, before any training. Raises ValueError naming its key.

        ``classes``: those that `recognised` is about.
        """
        two, longest = [*pixels(examples, 1)] * 2, max(prompts, key=len, default="a picture")
        judges = {
            "clip": lambda: self._clip(two, [longest] * 2),
            "dino": lambda: self._dino(two),
            "fid": lambda: self._inception.update(*_batches(two), real=True),
            "classifier": lambda: (self._distance.update(*_batches(two), real=True), self._seen.named(classes)),
        }
        for name, judge in judges.items():
            if given := getattr(self, name):
                try:
                    judge()
                except Exception as error:  # a model's own code may raise anything
                    source = f"={given}" if isinstance(given, str) else ""
                    raise ValueError(f"task.quality.{name}{source}: {brief(error, given)}") from error

    # ------------------------------------------------------------------------------------ similarities of pictures

    def of_prompts(self, made: Tensor, prompts: Sequence[str], examples: Captioned) -> dict[str, float]:
        """CLIP-T: the mean cosine of pictures and their prompts. CLIP-I and DINO: of pictures and up to as many of the
        data's (DreamBooth, Ruiz et al. 2023, section 4.2). ``made`` (n, channels, height, width) from 0 to 1."""
        numbers: dict[str, float] = {}
        if not (self.clip or self.dino) or not made.isfinite().all():
            return dict.fromkeys(self._names(), float("nan"))
        count = min(len(made), len(examples))
        if self.clip:
            pictures, texts = self._clip(made, prompts)
            numbers["CLIP-T"] = (pictures * texts).sum(-1).mean().item()
            real, _ = self._clip(pixels(examples, count), repeat(""))
            numbers["CLIP-I"] = (pictures @ real.mT).mean().item()
        if self.dino:
            numbers["DINO"] = (self._dino(made) @ self._dino(pixels(examples, count)).mT).mean().item()
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

    def _clip(self, pictures: Iterable[Tensor], prompts: Iterable[str]) -> tuple[Tensor, ...]:
        """(n, width) each: unit vectors of pictures and of prompts."""
        (model, processor), texts = self._clip_model, iter(prompts)
        keys = {"return_tensors": "pt", "padding": True, "truncation": True, "do_rescale": False}
        made = [
            model(**processor(images=list(some), text=list(islice(texts, len(some))), **keys))
            for some in _batches(pictures)
        ]
        return tuple(_units([one[name] for one in made]) for name in ("image_embeds", "text_embeds"))

    def _dino(self, pictures: Iterable[Tensor]) -> Tensor:
        """(n, width): unit vectors, of the class token."""
        model, processor = self._dino_model
        keys = {"return_tensors": "pt", "do_rescale": False}
        made = [model(**processor(list(some), **keys)).last_hidden_state for some in _batches(pictures)]
        if made[0].ndim != 3:
            raise ValueError(f"{type(model).__name__} has no class token")
        return _units([tokens[:, 0] for tokens in made])

    @cached_property
    def _clip_model(self) -> tuple[nn.Module, Any]:
        return _loaded(self.clip, "AutoProcessor")

    @cached_property
    def _dino_model(self) -> tuple[nn.Module, Any]:
        return _loaded(self.dino, "AutoImageProcessor")

    # --------------------------------------------------------------------------------------- many pictures at once

    def of_data(self, model: Denoiser, examples: Captioned, keys: Samples) -> dict[str, float]:
        """FID, and FD in the classifier's features: distances of generated pictures from the data, over the captions of
        the data in turn. recognised: the share of pictures in which the classifier sees the class of the caption."""
        if not (self.fid or self.classifier):
            return {}
        captions = [examples.caption(index % len(examples)) for index in range(self.images)]
        classes = model.frozen.classes if self.classifier else []
        names = self._seen.named(classes) if classes else []
        metrics = {"FID": self._inception} if self.fid else {}
        metrics |= {"FD": self._distance} if self.classifier else {}
        seen: list[str] = []
        for metric in metrics.values():
            metric.reset()
        for some in _batches(model.pictures(captions, range(self.images), keys)):
            if not some.isfinite().all():
                return dict.fromkeys([*metrics, *(["recognised"] if names else [])], float("nan"))
            for metric in metrics.values():
                metric.update(some, real=False)
            seen += self._seen.classes(some, names) if names else []
        for some in _batches(pixels(examples, len(examples))):
            for metric in metrics.values():
                metric.update(some, real=True)
        numbers = {name: metric.compute().item() for name, metric in metrics.items()}
        if names:
            numbers["recognised"] = sum(map(eq, seen, captions)) / len(seen)
        return numbers

    @cached_property
    def _inception(self) -> Any:
        """torchmetrics' FID, whose weights torch-fidelity downloads."""
        try:
            return _frechet(2048)
        except Exception as error:  # of the network's, the disk's and torch's many classes
            raise ValueError(f"Inception can't be loaded: {brief(error)}") from error

    @cached_property
    def _distance(self) -> Any:
        """The same in the classifier's features."""
        return _frechet(self._seen)

    @cached_property
    def _seen(self) -> Classifier:
        from flora_lab.tasks.diffusion.judges import Classifier

        return Classifier(self.classifier)


def _frechet(features: int | nn.Module) -> Any:
    """torchmetrics' Fréchet distance in the features of Inception (their number), or of a module."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(features, normalize=True)


def _loaded(name: str, processor: str) -> tuple[nn.Module, Any]:
    """A model, and its processor of transformers' Auto class ``processor``."""
    import transformers

    source = Pretrained(name=name).source()
    model = transformers.AutoModel.from_pretrained(source).eval().requires_grad_(False)
    return model, getattr(transformers, processor).from_pretrained(source)


def pixels(examples: Captioned, count: int) -> Iterator[Tensor]:
    """The first ``count`` pictures of the data, one by one, each (channels, size, size) from 0 to 1."""
    return counted((examples[index]["pixel_values"] / 2 + 0.5 for index in range(count)), count, "judging")


def _batches(pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    """Some at a time, (n, 3, height, width)."""
    import torch

    pictures = iter(pictures)
    while some := list(islice(pictures, BATCH)):
        yield torch.stack(some).expand(-1, 3, -1, -1)


def _units(parts: Sequence[Tensor]) -> Tensor:
    """All rows, as unit vectors."""
    import torch
    import torch.nn.functional as F

    return F.normalize(torch.cat(list(parts)), dim=-1)
