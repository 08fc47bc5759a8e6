"""Fine-tune a detector of transformers on pictures with boxes in COCO's JSON:

    python examples/detection.py PICTURES boxes.json OUTPUT --model facebook/detr-resnet-50

PICTURES is the folder that the JSON's file names start from.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments
from transformers.image_utils import load_image

from flora import FloraConfig


def read(file: str, pictures: str) -> tuple[list[tuple[Path, dict]], dict[int, str]]:
    """Each picture with its boxes as COCO has them, and the names of the classes. Classes are counted from 0."""
    content = json.loads(Path(file).read_text())
    number = {category["id"]: n for n, category in enumerate(content["categories"])}
    boxes = defaultdict(list)
    for box in content["annotations"]:
        boxes[box["image_id"]].append(box | {"category_id": number[box["category_id"]]})
    rows = [
        (Path(pictures, image["file_name"]), {"image_id": image["id"], "annotations": boxes[image["id"]]})
        for image in content["images"]
    ]
    return rows, {number[category["id"]]: category["name"] for category in content["categories"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures")
    parser.add_argument("boxes")
    parser.add_argument("output")
    parser.add_argument("--model", default="facebook/detr-resnet-50")
    parser.add_argument("--budget", type=float, default=0.01, help="share of the model's parameters")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()

    rows, names = read(given.boxes, given.pictures)
    processor = AutoImageProcessor.from_pretrained(given.model)
    base = AutoModelForObjectDetection.from_pretrained(given.model, id2label=names, ignore_mismatched_sizes=True)
    heads = ["class_labels_classifier", "bbox_predictor"]  # the classes are new: both are trained whole
    config = FloraConfig(budget=given.budget, exclude_modules=heads, modules_to_save=heads)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def collate(batch: list[tuple[Path, dict]]) -> dict:
        images = [load_image(str(file)) for file, _ in batch]  # upright, as their EXIF says
        made = processor(images=images, annotations=[boxes for _, boxes in batch], return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "pixel_mask": made["pixel_mask"], "labels": made["labels"]}

    arguments = TrainingArguments(
        given.output, learning_rate=3e-4, max_steps=given.steps, per_device_train_batch_size=2, warmup_steps=20,
        report_to="none", remove_unused_columns=False, save_strategy="no", logging_steps=10, max_grad_norm=0.1,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()
