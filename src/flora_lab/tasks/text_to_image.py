"""Text to image: diffusion models of diffusers, fine-tuned on pictures with captions, or on a few of one subject."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.base import Task
from flora_lab.tasks.diffusion.captions import Captioned, Captions, read_captions, split_captions
from flora_lab.tasks.diffusion.noise import Noise
from flora_lab.tasks.diffusion.pipeline import Pipeline, check_steps
from flora_lab.tasks.diffusion.quality import Quality
from flora_lab.tasks.diffusion.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerCallback

    from flora_lab.tasks.data.records import Records
    from flora_lab.tasks.diffusion.denoiser import Denoiser, Frozen


@dataclass
class TextToImage(Task):
    name: str = field(default="text_to_image", metadata={"help": "the task"})
    model: Pipeline = field(default_factory=Pipeline)
    data: Captions = field(default_factory=Captions)
    source: Captions | None = field(default=None, metadata={"help": "data that the base model is trained on first"})
    noise: Noise = field(default_factory=Noise)
    samples: Samples = field(default_factory=Samples)
    quality: Quality = field(default_factory=Quality)
    ema: float | None = field(
        default=None, metadata={"help": "decay of an average of the weights, which is kept", "above": 0, "most": 1}
    )

    metric = "explained"

    def __post_init__(self):
        if self._of_classes and self.data.drop:
            raise ValueError(f"task.data.drop={self.data.drop}: a model of classes knows no empty caption")

    def source_task(self) -> TextToImage | None:
        return self.source and replace(self, data=self.source, source=None)

    # ------------------------------------------------------------------------------------------------------------ data

    def splits(self, seed: int) -> dict[str, Captioned]:
        keys = self.data
        self.model.check()
        self.quality.need_packages()
        splits = split_captions(self._source[0], keys, seed)
        return {
            name: Captioned(records, keys, self.channels, name == "train", self._prior if name == "train" else None)
            for name, records in splits.items()
        }

    def check(self, splits: dict[str, Captioned]) -> None:
        """Also that a model of classes knows the prompts of the samples, and that these can be made and judged."""
        for examples in splits.values():
            examples.check()
        prompts = (*self.samples.prompts, *self.samples.drift_prompts)
        if self._of_classes and (unknown := [prompt for prompt in prompts if prompt not in self.classes]):
            raise ValueError(f"task.samples: {unknown[0]!r} is no class of {self.data.path}, {', '.join(self.classes)}")

        if prompts or self.quality.fid or self.quality.classifier:
            check_steps(self._frozen, self.samples.steps)
        self.quality.check(splits["test"], self.samples.prompts, self.classes if self._of_classes else ())

    @cached_property
    def _source(self) -> tuple[dict[str, Records], list[str]]:
        return read_captions(self.data, needed=self.model.name is not None or self._of_classes)

    @property
    def classes(self) -> list[str]:
        """All captions, by their number in a model of classes."""
        return self._source[1]

    @cached_property
    def _prior(self) -> Captioned | None:
        keys = self.data
        if keys.prior is None:
            return None
        keys = replace(keys, path=keys.prior, prompt=keys.prior_prompt, prior=None, prior_prompt=None, drop=0.0)
        return Captioned(read_captions(keys)[0]["train"], keys, self.channels, training=True)

    @property
    def _of_classes(self) -> bool:
        """Whether the captions are classes of the model."""
        return self.model.name is None and bool(self.model.config.get("num_class_embeds"))

    @property
    def channels(self) -> int:
        return 3 if self.model.name else self.model.config.get("in_channels", 3)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pictures of the prior come last, with their weight."""
        import torch

        priors = [example["prior"] for example in examples if "prior" in example]
        every = [*examples, *priors]
        batch = {name: torch.stack([example[name] for example in every]) for name in ("pixel_values", "geometry")}
        batch["prompts"] = [example["prompts"] for example in every]
        batch["labels"] = torch.tensor([example["labels"] for example in every])
        if priors:
            weights = [1.0] * len(examples) + [self.data.prior_weight] * len(priors)
            batch["weights"] = torch.tensor(weights)
        return batch

    # ----------------------------------------------------------------------------------------------------------- model

    def build(self) -> Denoiser:
        return self.model.build(self._frozen, self.noise, self.data.size)

    @cached_property
    def _frozen(self) -> Frozen:
        """Loaded once: all models of the task share it."""
        frozen = self.model.frozen(self.classes if self._of_classes else ())
        if self.noise.snr_gamma is not None and not frozen.process.has_snr:
            raise ValueError(f"task.noise.snr_gamma={self.noise.snr_gamma}: flow matching has no such weights")
        return frozen

    def head(self, model: nn.Module) -> list[str]:
        """None: a pipeline has no new part."""
        return []

    def targets_of(self, model: nn.Module) -> str | list[str]:
        """Every layer that files for diffusers and ComfyUI can hold; of a model of pixels, its embedding too."""
        from torch import nn

        if self.model.name is None:
            return self.targets
        return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]

    # -------------------------------------------------------------------------------------------------------- judgement

    def outputs(self, model: nn.Module, examples: Sequence[dict[str, Any]]) -> Tensor:
        return model(**self.collate(examples))["prediction"]

    @staticmethod
    def reduce(logits: Any, labels: Tensor) -> Tensor:
        """(batch, 2): the mean squares of each example's error, and of its target."""
        import torch

        prediction, target = logits
        return torch.stack([(prediction - target).square().flatten(1).mean(1), target.square().flatten(1).mean(1)], 1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """explained: the share of the target's square that the prediction explains, 1 - Σ|error|² / Σ|target|².

        Times and noise depend on the example alone. NaN if the model diverged.
        """
        errors, targets = prediction.predictions.sum(0).tolist()
        return {"explained": 1 - errors / targets if math.isfinite(errors) and targets else math.nan}

    def callbacks(self, folder: Path) -> list[TrainerCallback]:
        from flora_lab.tasks.diffusion.callbacks import Averaging, SampleEpochs

        made: list[TrainerCallback] = []
        if self.samples.every_epoch and self.samples.prompts:
            made.append(SampleEpochs(self.samples, folder / "samples"))
        return [*made, Averaging(self.ema)] if self.ema else made  # samples first: they are of the averaged weights

    def judge(
        self, model: nn.Module, base: Callable[[], nn.Module], splits: dict[str, Captioned], folder: Path
    ) -> dict[str, Any]:
        """Sample pictures and their quality, and files for diffusers and ComfyUI if it is an adapter of a pipeline."""
        from flora_lab.tasks.diffusion.files import export
        from flora_lab.tasks.diffusion.samples import judge_samples

        row = judge_samples(model, base(), splits["test"], self, folder / "samples")
        row["notes"] = export(folder / "trained", self.model.parts(), folder / "export") if self.model.name else []
        return row
