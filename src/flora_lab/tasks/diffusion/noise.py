"""How pictures are noised for training: by a variance-preserving process (DDPM), or along straight paths (flow
matching).

Both mix a clean picture with noise at a time, which is given as a share of the process, and say what a model is to
predict there. The noise schedule, and what is predicted, are those of a scheduler of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DENSITIES = ("uniform", "logit_normal", "mode")


@dataclass
class Noise:
    """How the noise of the training is drawn and weighted."""

    snr_gamma: float | None = field(
        default=None, metadata={"help": "min-SNR weighting of the loss (5 is usual; not for flow matching)", "above": 0}
    )
    offset: float = field(default=0.0, metadata={"help": "noise that a channel's pixels share", "least": 0})
    density: str = field(
        default="uniform", metadata={"help": "of the times in training (SD 3: logit_normal)", "choices": DENSITIES}
    )

    def draw(self, like: Tensor) -> Tensor:
        """Noise for training."""
        import torch

        noise = torch.randn_like(like)
        shared = (*like.shape[:2], *[1] * (like.ndim - 2))
        return noise + self.offset * torch.randn(shared, device=like.device) if self.offset else noise

    def times(self, count: int) -> Tensor:
        """(count,) shares of the process in [0, 1), for training."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        return compute_density_for_timestep_sampling(self.density, count, 0.0, 1.0, 1.29)


class VariancePreserving:
    """DDPM's process: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (Ho et al. 2020, equation 4)."""

    has_snr = True  # and so min-SNR weights

    def __init__(self, scheduler: Any):
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type={self.kind!r}: expected epsilon, v_prediction or sample")

    def mix(self, clean: Tensor, noise: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The noisy picture, what is to be predicted there, and the timestep (batch,) as the model takes it."""
        count = self.scheduler.config.num_train_timesteps
        steps = (shares * count).long().clamp(max=count - 1).to(clean.device)
        targets = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: self.scheduler.get_velocity(clean, noise, steps),
        }
        return self.scheduler.add_noise(clean, noise, steps), targets[self.kind](), steps

    def weights(self, steps: Tensor, gamma: float | None) -> Tensor:
        """(batch,) weights of the squared errors: min-SNR-γ (Hang et al. 2023, section 3.4), or ones."""
        import torch
        from diffusers.training_utils import compute_snr

        if gamma is None:
            return torch.ones_like(steps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, steps)
        least = snr.clamp(max=gamma)
        return {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[self.kind]

    def sampler(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler.config)


class FlowMatching:
    """Straight paths: x_σ = (1 - σ) x_0 + σ ε, along which ε - x_0 is predicted (Esser et al. 2024, equation 13)."""

    has_snr = False

    def __init__(self, scheduler: Any):
        self.scheduler = type(scheduler).from_config(scheduler.config)
        # in training the shift does not depend on the resolution; sampling sets its own times
        self.timesteps, self.sigmas = self.scheduler.timesteps.clone(), self.scheduler.sigmas.clone()

    def mix(self, clean: Tensor, noise: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self.timesteps)
        places = (shares * count).long().clamp(max=count - 1).cpu()
        sigmas = self.sigmas[places].to(clean).view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigmas) * clean + sigmas * noise, noise - clean, self.timesteps[places].to(clean.device)

    def weights(self, steps: Tensor, gamma: None) -> Tensor:
        return steps.new_ones(len(steps))

    def sampler(self) -> Any:
        return type(self.scheduler).from_config(self.scheduler.config)


def process_of(scheduler: Any) -> VariancePreserving | FlowMatching:
    """The process of a scheduler. Raises ValueError for one that no training is known for."""
    if "FlowMatch" in type(scheduler).__name__:
        return FlowMatching(scheduler)
    if hasattr(scheduler, "alphas_cumprod"):
        return VariancePreserving(scheduler)
    raise ValueError(f"{type(scheduler).__name__}: expected a scheduler with alphas_cumprod, or of flow matching")
