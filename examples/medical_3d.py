"""Adapt MONAI's 3-D U-Net to new volumes:

    python examples/medical_3d.py OUTPUT

Needs `pip install monai`. The volumes are made up: bright balls in noise. Put your scans into `volumes`.
"""

import argparse

import torch
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from peft import get_peft_model

from flora import FloraConfig


def volumes(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans (count, 1, size, size, size), and for each voxel whether it is part of the ball, of the same shape."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij")).float()
    centres = torch.rand(count, 3, 1, 1, 1) * size / 2 + size / 4
    inside = ((grid - centres).square().sum(1, keepdim=True) < (size / 4) ** 2).long()
    return inside + 0.5 * torch.randn(count, 1, size, size, size), inside


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--weights", help="state dict of a pre-trained network")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()

    torch.manual_seed(0)
    net = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    if given.weights:
        net.load_state_dict(torch.load(given.weights, weights_only=True))
    model = get_peft_model(net, FloraConfig(budget=0.2))
    model.print_trainable_parameters()
    dice = DiceLoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(1, given.steps + 1):
        scans, labels = volumes(2, given.size)
        loss = dice(model(scans), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == given.steps:
            print(f"step {step}: Dice loss {loss.item():.3f}")
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()
