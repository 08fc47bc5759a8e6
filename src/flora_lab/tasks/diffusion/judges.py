"""The classifier that judges pictures: its features, for a Fréchet distance, and the classes that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from flora_lab.tasks.diffusion.samples import image
from flora_lab.tasks.models.cifar_resnet import CifarResNetConfig
from flora_lab.tasks.models.pretrained import Pretrained

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class Classifier(nn.Module):
    """What the output layer of a classifier gets, as a module for torchmetrics: from pictures (n, 3, height, width),
    from 0 to 1, to (n, ``num_features``).

    A named classifier sees pictures as its own image processor makes them; one by config, and a `CifarResNet`, as they
    are, with ImageNet's normalisation. Raises ValueError if it has no linear output layer.
    """

    def __init__(self, keys: Pretrained):
        super().__init__()
        self.model = keys.load("AutoModelForImageClassification", ()).eval().requires_grad_(False)
        ours = self.model.config.model_type == CifarResNetConfig.model_type
        self.processor = None if keys.name is None or ours else AutoImageProcessor.from_pretrained(keys.source())
        classes = self.model.config.num_labels
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        outputs = [layer for layer in layers if layer.out_features == classes]
        if not outputs:
            raise ValueError(f"{type(self.model).__name__} has no linear layer of {classes} classes")
        self.output = outputs[-1]
        self.num_features = self.output.in_features

    def forward(self, pictures: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self.output.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        try:
            self._logits(pictures)
        finally:
            handle.remove()
        if not seen or seen[0].ndim != 2:
            raise ValueError(f"{type(self.model).__name__}: its output layer does not get one vector per picture")
        return seen[0]

    def classes(self, pictures: Tensor, names: Sequence[str]) -> list[str]:
        """The class that it sees in each, by its name of `named`."""
        return [names[number] for number in self._logits(pictures).argmax(-1).tolist()]

    def named(self, known: Sequence[str]) -> list[str]:
        """The classes by their number: with the names of ``known``, the data's, where it has the same ones, and its own
        elsewhere. A classifier without names has those of the data in their order.

        Raises ValueError if it lacks a class of the data.
        """
        own = [str(self.model.config.id2label[number]) for number in range(self.model.config.num_labels)]
        if own == [f"LABEL_{number}" for number in range(len(known))]:
            return list(known)
        numbers = {word.strip().lower(): number for number, name in enumerate(own) for word in name.split(",")}
        if missing := [name for name in known if name.lower() not in numbers]:
            raise ValueError(f"it has no class {missing[0]!r} of the data; its own: {shorten(', '.join(own), 200)}")
        for name in known:
            own[numbers[name.lower()]] = name
        return own

    def _logits(self, pictures: Tensor) -> Tensor:
        if self.processor is None:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
            return self.model((pictures - mean) / std).logits
        files = [image(picture) for picture in pictures]  # not all processors take tensors
        return self.model(self.processor(files, return_tensors="pt")["pixel_values"]).logits
