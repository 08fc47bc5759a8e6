"""Pictures of what an oriented detector finds, for a trial's row and folder: tiles with their boxes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flora.files import replace_file
from flora_lab.tasks.data import dota

if TYPE_CHECKING:
    from PIL.Image import Image

    from flora_lab.tasks.oriented_detection import OrientedDetection, TileExamples

COLOURS = ("#ffd400", "#00e5ff", "#ff4fa0", "#7cff4f", "#ff8c1a", "#b388ff", "#ffffff", "#4f8cff")
SURE = 0.3  # detections with a lower score are not drawn
THUMBNAIL = 256  # pixels


@torch.no_grad()
def samples(
    task: OrientedDetection, model: nn.Module, examples: TileExamples, folder: Path, count: int
) -> dict[str, Any]:
    """The ``count`` tiles with the most objects as a row's "samples": "images" with the boxes that were found,
    "base" with the labelled ones. Writes both as PNG into ``folder``."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    made: dict[str, Any] = {"prompts": [], "images": [], "base": [], "reference": "as labelled"}
    by_objects = sorted(range(len(examples)), key=lambda index: -len(examples.objects(index)[1]))
    for index in by_objects[:count]:
        pixels = examples[index]["pixel_values"]
        found = {name: value[0].cpu() for name, value in model(pixel_values=pixels[None].to(device)).items()}
        sure = found["scores"] > SURE
        quads, classes = examples.objects(index)
        tile = task.tiles[examples.tiles[index][0]]
        name = f"{Path(task.source.images[tile.place].file).stem} {tile.left},{tile.top}"
        made["prompts"].append(name)
        picture = _picture(pixels, task.data.mean, task.data.std)
        boxes = dota.corners(found["boxes"][sure].numpy()), found["classes"][sure].tolist()
        for key, ending, drawn in (
            ("images", "found", with_boxes(picture, *boxes)),
            ("base", "labelled", with_boxes(picture, quads, classes.tolist())),
        ):
            with replace_file(folder / f"{name.replace(' ', '-')}-{ending}.png") as file:
                drawn.save(file, "PNG")
            made[key].append(_encoded(drawn))
    model.train(training)
    return made


def with_boxes(picture: Image, quads: Any, classes: list[int]) -> Image:
    """A copy with the outlines (n, 4, 2); objects of class -1, of which a tile has too little, are left out."""
    from PIL import ImageDraw

    copy = picture.copy()
    pencil = ImageDraw.Draw(copy)
    for quad, number in zip(quads, classes, strict=True):
        if number > 0:
            pencil.polygon([tuple(map(float, corner)) for corner in quad], outline=COLOURS[(number - 1) % len(COLOURS)])
    return copy


def _picture(pixels: torch.Tensor, mean: list[float], std: list[float]) -> Image:
    from torchvision.transforms.v2.functional import to_pil_image

    shown = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return to_pil_image((shown.clamp(0, 1) * 255).round().byte())


def _encoded(picture: Image) -> str:
    """A thumbnail for a row, a JPEG in base64."""
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=85, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()
