"""A diffusion model for transformers' Trainer: what it is made of, its loss, and how it makes pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora_lab.lines import counted

if TYPE_CHECKING:
    from flora_lab.tasks.diffusion.noise import FlowMatching, Noise, VariancePreserving

GOLDEN = 0.6180339887498949  # multiples of it, modulo one, are spread evenly, however many there are


class Sampling(Protocol):
    """How pictures are made."""

    steps: int
    guidance: float
    batch: int


class Frozen:
    """What no method trains: a pipeline's VAE, tokenizers and other text encoders. No module, so that it is neither
    counted nor saved nor wrapped; copies of a model share it.

    Attributes:
        pipeline: of diffusers, without the trained parts; None for a model of pixels and classes.
        process: how pictures are noised.
        classes: the captions that a model of classes knows, by their number.
    """

    def __init__(self, pipeline: Any, process: VariancePreserving | FlowMatching, classes: Sequence[str] = ()):
        self.pipeline, self.process, self.classes = pipeline, process, list(classes)

    def __deepcopy__(self, memo: dict) -> Frozen:
        return self

    def to(self, device: torch.device) -> None:
        for part in self.pipeline.components.values() if self.pipeline else ():
            if isinstance(part, nn.Module) and next(part.parameters()).device != device:
                part.to(device)


class Denoiser(nn.Module):
    """The trained parts of a pipeline, as modules of the pipeline's names ("unet", "text_encoder").

    Args:
        parts: the denoising model, and text encoders that are trained too.
        frozen: the rest.
        noise: how the noise of the training is drawn and weighted.
        size: of pictures, in pixels.
    """

    def __init__(self, parts: dict[str, nn.Module], frozen: Frozen, noise: Noise, size: int):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.frozen, self.noise, self.size = frozen, noise, size
        self.main = next(iter(parts))

    @property
    def denoiser(self) -> Any:
        return self.get_submodule(self.main)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def forward(
        self,
        pixel_values: Tensor,
        prompts: Sequence[str],
        geometry: Tensor | None = None,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The denoising loss, the prediction and its target (batch, channels, height, width).

        Args:
            pixel_values: (batch, channels, size, size) from -1 to 1.
            prompts: one caption each.
            geometry: (batch, 6) as SDXL takes it.
            weights: (batch,) of the squared errors; default: ones.
            labels: (batch,) numbers of the examples. In evaluation they decide on time and noise, so that one model
                always has one loss.
        """
        clean = self._encode(pixel_values)
        if self.training:
            noise, shares = self.noise.draw(clean), self.noise.times(len(clean))
        else:
            numbers = range(len(clean)) if labels is None else labels.tolist()
            shares = torch.tensor([(GOLDEN * (number + 1)) % 1 for number in numbers])
            noise = _noise(numbers, clean.shape[1:]).to(clean)
        noisy, target, steps = self.frozen.process.mix(clean, noise, shares)
        prediction = self._predict(noisy, steps, self._condition(prompts, geometry)).float()
        errors = (prediction - target.float()).square().flatten(1).mean(1)
        if self.training:
            errors = errors * self.frozen.process.weights(steps, self.noise.snr_gamma)
        if weights is not None:
            errors = errors * weights
        return {"loss": errors.mean(), "prediction": prediction, "target": target}

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], keys: Sampling) -> Tensor:
        """All `pictures`, (number of prompts, channels, size, size)."""
        return torch.stack(list(self.pictures(prompts, seeds, keys)))

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], keys: Sampling) -> Iterator[Tensor]:
        """One picture per prompt and its seed, each (channels, size, size) from 0 to 1, on the CPU.

        A seed gives the same starting noise for every method. No random number of the training is used up.
        """
        return counted(self._pictures(prompts, seeds, keys), len(prompts), "sampling")

    def _pictures(self, prompts: Sequence[str], seeds: Sequence[int], keys: Sampling) -> Iterator[Tensor]:
        for start in range(0, len(prompts), keys.batch):
            some = slice(start, start + keys.batch)
            with torch.no_grad(), _evaluation(self), torch.random.fork_rng(_devices(self.device)):
                made = self._sample(prompts[some], seeds[some], keys)
            yield from made.float().cpu().clamp(0, 1)  # NaN stays

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int], keys: Sampling) -> Tensor:
        if pipeline := self._whole():
            cast(pipeline.vae, self.denoiser.dtype)
            made = pipeline(
                prompt=list(prompts),
                num_inference_steps=keys.steps,
                guidance_scale=keys.guidance,
                height=self.size,
                width=self.size,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            )
            cast(pipeline.vae, torch.float32)
            return made.images
        sampler, condition = self.frozen.process.sampler(), self._condition(prompts, None)
        sampler.set_timesteps(keys.steps)
        shape = (self.denoiser.config.in_channels, self.size, self.size)
        latents = _noise(seeds, shape).to(self.device)
        for step in sampler.timesteps:
            prediction = self._predict(latents, step.expand(len(latents)).to(self.device), condition)
            latents = sampler.step(prediction.float(), step, latents).prev_sample
        return latents / 2 + 0.5

    # -------------------------------------------------------------------------------------------------------- its parts

    def _whole(self) -> Any:
        """The pipeline, with the trained parts in it."""
        pipeline = self.frozen.pipeline
        if pipeline is not None:
            for name, part in self.named_children():
                setattr(pipeline, name, part)
            self.frozen.to(self.device)
        return pipeline

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels, or what the VAE makes of them."""
        if self.frozen.pipeline is None:
            return pixels
        vae = self._whole().vae
        with torch.autocast(pixels.device.type, enabled=False):  # many VAEs overflow in half precision
            places = vae.encode(pixels.to(vae.dtype)).latent_dist
            latents = places.sample() if self.training else places.mode()
        return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def _condition(self, prompts: Sequence[str], geometry: Tensor | None) -> dict[str, Any]:
        pipeline = self._whole()
        conditioned = CONDITIONS[type(self.denoiser).__name__]
        trained = len(list(self.children())) > 1
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            made = conditioned(self, pipeline, list(prompts), geometry)
        return {name: x.to(self.denoiser.dtype) if _floating(x) else x for name, x in made.items()}

    def _predict(self, noisy: Tensor, steps: Tensor, condition: dict[str, Any]) -> Tensor:
        noisy = noisy.to(self.denoiser.dtype)
        if type(self.denoiser).__name__ == "FluxTransformer2DModel":
            return _flux(self.denoiser, noisy, steps, condition)
        return self.denoiser(noisy, timestep=steps, return_dict=False, **condition)[0]


# ------------------------------------------------------------------------------- what each kind of denoiser is told


def _of_classes(model: Denoiser, pipeline: None, prompts: list[str], geometry: Tensor | None) -> dict[str, Any]:
    if model.denoiser.class_embedding is None:
        return {}
    numbers = [model.frozen.classes.index(prompt) for prompt in prompts]
    return {"class_labels": torch.tensor(numbers, device=model.device)}


def _of_unet(model: Denoiser, pipeline: Any, prompts: list[str], geometry: Tensor | None) -> dict[str, Any]:
    """Stable Diffusion's, or SDXL's, which also takes a pooled embedding and the picture's geometry."""
    keys = {"device": model.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if model.denoiser.config.addition_embed_type != "text_time":
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, **keys)[0]}
    embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, **keys)
    if geometry is None:
        geometry = torch.tensor([[model.size, model.size, 0, 0, model.size, model.size]]).repeat(len(prompts), 1)
    added = {"text_embeds": pooled, "time_ids": geometry.to(pooled)}
    return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}


def _of_sd3(model: Denoiser, pipeline: Any, prompts: list[str], geometry: Tensor | None) -> dict[str, Any]:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=model.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def _of_flux(model: Denoiser, pipeline: Any, prompts: list[str], geometry: Tensor | None) -> dict[str, Any]:
    embeddings, pooled, places = pipeline.encode_prompt(prompts, device=model.device)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled, "txt_ids": places}


CONDITIONS: dict[str, Callable[[Denoiser, Any, list[str], Tensor | None], dict[str, Any]]] = {
    "UNet2DModel": _of_classes,
    "UNet2DConditionModel": _of_unet,
    "SD3Transformer2DModel": _of_sd3,
    "FluxTransformer2DModel": _of_flux,
}


def _flux(transformer: Any, noisy: Tensor, steps: Tensor, condition: dict[str, Any]) -> Tensor:
    """FLUX sees two by two latents as one token, each with its place in the picture, and times from 0 to 1."""
    tokens = F.pixel_unshuffle(noisy, 2)  # (batch, 4 · channels, rows, columns)
    rows, columns = tokens.shape[-2:]
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    guided = transformer.config.guidance_embeds
    predicted = transformer(
        tokens.flatten(2).mT,
        timestep=steps / 1000,
        img_ids=places.to(noisy),  # (rows · columns, 3)
        guidance=noisy.new_ones(len(noisy)) if guided else None,
        return_dict=False,
        **condition,
    )[0]
    return F.pixel_shuffle(predicted.mT.unflatten(2, (rows, columns)), 2)


# ------------------------------------------------------------------------------------------------------------- helpers


def _noise(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """(number of seeds, *shape): the same on every machine."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def cast(part: Any, dtype: torch.dtype) -> Any:
    """A model with its weights converted in place, if they have another dtype."""
    return part if part.dtype == dtype else part.to(dtype)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _devices(device: torch.device) -> list[torch.device]:
    return [] if device.type == "cpu" else [device]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
