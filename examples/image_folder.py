"""Fine-tune a timm model on a folder of images, one sub-folder per class, with a plain training loop:

python examples/image_folder.py photos OUTPUT --model convnextv2_tiny
"""

import argparse
from itertools import islice

import timm
import torch
from peft import get_peft_model
from PIL import ImageOps
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader

import flora
from flora import FloraConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos")
    parser.add_argument("output")
    parser.add_argument("--model", default="convnextv2_tiny")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is downloaded")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()

    data = ImageDataset(given.photos)
    classes = len(data.reader.class_to_idx)
    base = timm.create_model(given.model, pretrained=not given.random, num_classes=classes)
    augment = create_transform(
        **resolve_model_data_config(base) | {"input_size": (3, given.size, given.size)}, is_training=True
    )
    data.transform = lambda photo: augment(ImageOps.exif_transpose(photo))  # upright
    batches = DataLoader(data, batch_size=8, shuffle=True)

    head = base.default_cfg["classifier"]
    config = FloraConfig(budget=0.02, init="gradient", modules_to_save=[head])
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(model(images), labels)

    flora.initialize(model, list(islice(batches, 32)), loss=loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = 0
    while step < given.steps:
        for batch in batches:
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == given.steps:
                print(f"step {step}: loss {value.item():.3f}")
            if step == given.steps:
                break
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()
