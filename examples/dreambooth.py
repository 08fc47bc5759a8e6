"""Teach Stable Diffusion one subject from a few photos, DreamBooth's way, and write the files that other programs load:

    python examples/dreambooth.py PHOTOS OUTPUT --prompt "a photo of sks dog"

Needs `pip install diffusers`. PHOTOS is a folder of pictures, without captions.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import load_image
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from flora import FloraConfig
from flora.convert import export_diffusers, export_locon

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]  # attention, and the convolutions of the blocks


@torch.no_grad()
def encoded(pipeline: StableDiffusionPipeline, photos: Path) -> torch.Tensor:
    """The photos as latents (photos, channels, height, width), at the size that the model draws."""
    images = [load_image(str(file)) for file in sorted(photos.iterdir())]  # upright, as their EXIF says
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pixels = pipeline.image_processor.preprocess(images, size, size, resize_mode="crop").to(pipeline.device)
    return pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor


def save(unet: torch.nn.Module, folder: Path) -> None:
    """An adapter as PEFT saves it: diffusers' own functions write LoRA only."""
    unet.peft_config["default"].save_pretrained(folder)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompt", default="a photo of sks dog")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--budget", type=int, default=1_600_000, help="trainable parameters")
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(given.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    pipeline.unet.add_adapter(FloraConfig(budget=given.budget, target_modules=TARGETS))

    photos = encoded(pipeline, given.photos)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(given.prompt, pipeline.device, 1, do_classifier_free_guidance=False)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW([p for p in pipeline.unet.parameters() if p.requires_grad], lr=1e-4)
    for step in range(1, given.steps + 1):
        clean = photos[torch.randint(len(photos), (1,))]
        noise = torch.randn_like(clean)
        time = torch.randint(noising.config.num_train_timesteps, (1,), device=clean.device)
        predicted = pipeline.unet(noising.add_noise(clean, noise, time), time, text).sample
        velocity = noising.config.prediction_type == "v_prediction"
        target = noising.get_velocity(clean, noise, time) if velocity else noise
        loss = torch.nn.functional.mse_loss(predicted, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == given.steps:
            print(f"step {step}: loss {loss.item():.3f}")

    save(pipeline.unet, given.output / "adapter")
    print(export_diffusers(given.output / "adapter", given.output / "diffusers"))
    print(export_locon(given.output / "adapter", given.output / "comfyui.safetensors"))
    pipeline(given.prompt, num_inference_steps=25).images[0].save(given.output / "sample.png")


if __name__ == "__main__":
    main()
