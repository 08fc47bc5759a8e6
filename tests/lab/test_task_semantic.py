"""Semantic segmentation: what is read and refused, what is shown, how it is judged, and that it trains."""

import io
import math
import re
import shutil
import warnings
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, EvalPrediction, Trainer, TrainingArguments

from flora_lab.tasks.models.pretrained import Pretrained, make_config
from flora_lab.tasks.semantic_segmentation import IGNORED, Scenes, SemanticSegmentation

TINY = {"model_type": "convnextv2", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_size": 2}
HEAD = {"hidden_size": 8, "auxiliary_channels": 8}


def scene(number, height=24, width=32, classes=3):
    """A picture of coloured stripes, and which stripe each pixel is in."""
    labels = (np.arange(width)[None, :] * classes // width + np.zeros((height, 1), int) + number) % classes
    return np.stack([labels * 80, labels * 40, np.full_like(labels, number)], -1).astype("uint8"), labels.astype(
        "uint8"
    )


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def parquet(folder, scenes, split="train"):
    feature = datasets.Image()
    rows = [tuple(one if isinstance(one, bytes) else encoded(one) for one in pair) for pair in scenes]
    columns = {"image": [{"bytes": one} for one, _ in rows], "annotation": [{"bytes": two} for _, two in rows]}
    table = datasets.Dataset.from_dict(columns, datasets.Features(image=feature, annotation=feature))
    table.to_parquet(folder / f"{split}.parquet")
    return folder / f"{split}.parquet"


def tiny_data(folder):
    """Makes data of 3 classes (and 11, which is ignored) in ``folder``; the overrides that make any semantic
    segmentation YAML run on them in seconds."""
    scenes = [scene(number) for number in range(12)]
    for _, labels in scenes:
        labels[0] = 11
    for split, some in (("train", scenes[:8]), ("validation", scenes[8:])):
        parquet(folder, some, split)
    return [
        f"task.data.path={folder}",
        "task.data.ignore=[11]",
        "task.data.classes=3",
        "task.data.reduce_labels=false",
        "task.data.size=[24,32]",
        "task.data.crop=[]",
        "task.backbone.name=null",
        "task.backbone.weights=null",
        "task.backbone.config={model_type: cifar_resnet, depth: 8, widths: [4, 8, 8]}",
        "task.model.config={model_type: upernet, hidden_size: 8, auxiliary_channels: 8}",
        "task.data.train_examples=null",
        "task.data.validation_examples=null",
        "task.data.test_examples=null",
        "task.data.validation_share=0.25",
        "training.batch_size=2",
        "training.eval_batch_size=2",
        "training.loaders=0",
        "training.mixed_precision='no'",
        "budget=500",
    ]


def task(path, model=HEAD, backbone=TINY, **data):
    return SemanticSegmentation(
        model=Pretrained(config=dict(model)), backbone=backbone and Pretrained(config=dict(backbone)),
        data=Scenes(path=str(path), **data),
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    tiny_data(tmp_path)
    return tmp_path


def folder_of(path, count=4):
    for number in range(count):
        for kind, array, ending in zip(("images", "annotations"), scene(number), ("jpg", "png"), strict=True):
            place = path / kind / ("training" if number % 2 else "validation") / f"{number}.{ending}"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place)
    return path


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_those_of_a_loop_over_pixels():
    logits, labels = torch.randn(3, 4, 5, 7), torch.randint(0, 3, (3, 10, 14))  # no pixel is of class 3
    labels[0, :4] = IGNORED
    large = torch.nn.functional.interpolate(logits, (10, 14), mode="bilinear")
    confusion = np.zeros((4, 4))
    for truth, guess in zip(labels.flatten().tolist(), large.argmax(1).flatten().tolist(), strict=True):
        if truth != IGNORED:
            confusion[truth, guess] += 1
    ious = [confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]) for c in range(4)]
    assert ious[3] == 0  # it is predicted, so it counts
    right = [confusion[c, c] / confusion[c].sum() for c in range(3)]

    batches = [
        SemanticSegmentation.reduce(logits[:2], labels[:2]),
        SemanticSegmentation.reduce((logits[2:],), labels[2:]),
    ]
    counts = torch.cat(batches)
    assert counts.shape == (3, 3, 4)
    found = task("").metrics(EvalPrediction(counts.numpy(), labels.numpy()))
    assert found["mIoU"] == pytest.approx(np.mean(ious)) and found["mAcc"] == pytest.approx(np.mean(right))
    assert found["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())


def judged(predicted, labels, classes):
    """The metrics of the classes that are predicted for each pixel."""
    logits = torch.nn.functional.one_hot(predicted, classes).movedim(-1, 1).float()
    counts = SemanticSegmentation.reduce(logits, labels)
    return task("").metrics(EvalPrediction(counts.numpy(), labels.numpy()))


def test_a_perfect_prediction_has_only_ones():
    labels = torch.randint(0, 5, (2, 6, 6))
    assert judged(labels, labels, 6) == {"mIoU": 1, "mAcc": 1, "accuracy": 1}  # class 5 is nowhere


def test_a_class_that_is_only_predicted_has_an_iou_of_0_and_no_accuracy():
    labels, predicted = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 2, 1, 1]]])
    third = pytest.approx((1 / 2 + 1 + 0) / 3)
    assert judged(predicted, labels, 4) == {"mIoU": third, "mAcc": 3 / 4, "accuracy": 3 / 4}
    predicted[0, 0, 1], labels[0, 0, 1] = 2, IGNORED  # where nothing is labelled it is not predicted either
    assert judged(predicted, labels, 4) == {"mIoU": 1, "mAcc": 1, "accuracy": 1}


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_model_that_diverged_has_no_metric(lost):
    logits, labels = torch.randn(3, 4, 5, 7), torch.randint(0, 3, (3, 10, 14))
    logits[1, 2, 3, 4] = lost
    counts = SemanticSegmentation.reduce(logits, labels)
    found = task("").metrics(EvalPrediction(counts.numpy(), labels.numpy()))
    assert set(found) == {"mIoU", "mAcc", "accuracy"} and all(map(math.isnan, found.values()))


# ------------------------------------------------------------------------------------------------------------- data


def test_three_splits_of_aligned_pictures_and_labels(data):
    job = task(data, ignore=[11])
    splits = job.splits(0)
    assert {name: len(some) for name, some in splits.items()} == {"train": 7, "validation": 1, "test": 4}
    assert job.classes == 3
    example = splits["test"][1]
    picture, labels = scene(9)
    assert (example["labels"][1:].numpy() == labels[1:]).all() and (example["labels"][0] == IGNORED).all()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (job.data.mean, job.data.std))
    shown = (example["pixel_values"] * std + mean) * 255
    assert torch.allclose(shown, torch.from_numpy(picture).permute(2, 0, 1).float(), atol=1e-3)


def test_what_is_augmented_stays_aligned(data):
    train = task(data, ignore=[11], augment=True, size=[24, 32], crop=[16, 20], mean=[0] * 3, std=[1] * 3).splits(0)[
        "train"
    ]
    for _ in range(10):
        example = train[0]
        assert example["pixel_values"].shape == (3, 16, 20) and example["labels"].shape == (16, 20)
        counted = example["labels"] != IGNORED
        red = (example["pixel_values"][0] * 255 / 80)[counted]
        assert ((red - example["labels"][counted]).abs() < 0.5).float().mean() > 0.8  # but for the edges of stripes


def test_a_picture_is_scaled_to_fit_and_padded(data):
    example = task(data, ignore=[11], size=[12, 12]).splits(0)["test"][0]
    assert example["pixel_values"].shape == (3, 12, 12)
    assert (example["labels"][9:] == IGNORED).all() and (example["labels"][1:9] != IGNORED).all()
    assert (example["pixel_values"][:, 9:] == 0).all()


def test_reduced_labels_start_at_one(tmp_path):
    parquet(tmp_path, [scene(number) for number in range(10)])
    job = task(tmp_path, reduce_labels=True)
    _, labels = scene(0)
    assert job.classes == 2
    shown = {int(a): int(b) for example in job.splits(0)["train"] for a, b in zip(labels[0], example["labels"][0])}  # noqa: B905
    assert set(shown.values()) <= {0, 1, IGNORED}


def test_a_folder_of_two_folders(tmp_path):
    splits = task(folder_of(tmp_path, 8), validation_share=0.25).splits(0)
    assert {name: len(some) for name, some in splits.items()} == {"train": 3, "validation": 1, "test": 4}
    assert set(splits["test"][0]["labels"].unique().tolist()) == {0, 1, 2}


# -------------------------------------------------------------------------------------------------------- bad data


def break_columns(path):
    return task(path, annotation="mask"), "no column 'mask', but image, annotation"


def break_empty(path):
    parquet(path, [scene(0)])
    parquet(path, [scene(1)], "validation")
    return task(
        path
    ), "the validation split is empty: task.data.validation_share=0.1 of 1 is below one example; raise it"


def break_label(path):
    parquet(path, [*(scene(n) for n in range(7)), (scene(7)[0], scene(7)[1] + 2)])
    return task(path, ignore=[11], classes=3), r"train\.parquet, row 7: 'annotation' has label [34], expected 0 to 2"


def break_corrupt(path):
    parquet(path, [*(scene(n) for n in range(7)), (encoded(scene(7)[0], "JPEG")[:300], scene(7)[1])])
    return task(path, ignore=[11]), r"train\.parquet, row 7: column 'image' is not a readable image"


def break_size(path):
    parquet(path, [*(scene(n) for n in range(7)), (scene(7)[0], scene(7, width=30)[1])])
    return task(path, ignore=[11]), r"row 7: 'image' and 'annotation' differ in size, 32 × 24 and 30 × 24"


def break_shapes(path):
    parquet(path, [*(scene(n) for n in range(7)), scene(7, width=30)])
    return task(path, ignore=[11]), "row 7: not of the first picture's size; set task.data.size"


def break_colour(path):
    parquet(path, [*(scene(n) for n in range(7)), (scene(7)[0], scene(7)[0])])
    return task(path, ignore=[11]), "row 7: 'annotation' is of mode RGB, expected one channel of whole numbers"


def break_numbers(path):
    parquet(path, [(encoded(scene(n)[0]), encoded(scene(n)[1] + np.float32(0.7), "TIFF")) for n in range(8)])
    return task(path, classes=3), "row 0: 'annotation' is of mode F, expected one channel of whole numbers"


def break_negative(path):
    parquet(path, [(encoded(scene(n)[0]), encoded(scene(n)[1].astype("int32") - 1, "TIFF")) for n in range(8)])
    return task(path, classes=3), "row 0: 'annotation' has label -1, expected 0 to 255"


def break_ignored(path):
    return task(path, ignore=[0, 1, 2, 11], classes=3), r"the train split has no labelled pixel, with .*ignore=\[0, 1"


def break_ignored_test(path):
    parquet(path, [(picture, np.full_like(labels, IGNORED)) for picture, labels in map(scene, range(2))], "validation")
    return task(path, ignore=[11], classes=3), "the test split has no labelled pixel"


def break_unknown(path):
    parquet(path, [(scene(1)[0], scene(1)[1]), (scene(8)[0], scene(8)[1] + 1)], "validation")
    return task(path, ignore=[11], classes=4), r"validation\.parquet, row 1: label 3 is not in the train split.*ignore"


def break_unknown_reduced(path):
    parquet(path, [scene(n) for n in range(8)])
    parquet(path, [(scene(8)[0], scene(8)[1] + 1)], "validation")
    return task(path, reduce_labels=True), r"validation\.parquet, row 0: label 3 is not in the train split"


def break_missing(path):
    folder_of(path / "pairs")
    (path / "pairs" / "annotations" / "training" / "1.png").unlink()
    return task(path / "pairs"), r"images.training.1\.jpg: there is no .*annotations.training.1"


def break_twice(path):
    shutil.copy(folder_of(path / "pairs") / "images/training/1.jpg", path / "pairs/images/training/1.png")
    return task(path / "pairs"), r"training.1\.jpg and .*training.1\.png have the same name"


def break_twice_labelled(path):
    shutil.copy(folder_of(path / "pairs") / "annotations/training/1.png", path / "pairs/annotations/training/1.tif")
    return task(path / "pairs"), r"training.1\.png and .*training.1\.tif have the same name"


def break_empty_split(path):
    for kind in ("images", "annotations"):
        (folder_of(path / "pairs") / kind / "testing").mkdir()
    (path / "pairs/images/testing/.hidden").touch()
    return task(path / "pairs"), "images.testing is empty"


def break_empty_folder(path):
    for kind in ("images", "annotations"):
        (path / "pairs" / kind).mkdir(parents=True)
    return task(path / "pairs"), "pairs.images is empty"


def break_path(path):
    return task(path / "nowhere"), "nowhere: no such file or folder"


BREAKS = [value for name, value in list(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda spoil: spoil.__name__)
def test_bad_data_is_named_before_training(spoil, data):
    job, message = spoil(data)
    with pytest.raises(ValueError, match=message):
        job.check(job.splits(0))


def test_of_a_few_pictures_train_may_lack_a_class(data):
    parquet(data, [(scene(8)[0], scene(8)[1] + 1)], "validation")
    job = task(data, ignore=[11], classes=4, train_examples=4)
    job.check(job.splits(0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": [24]}, r"task.data.size=\[24\]: expected a height and a width"),
        ({"crop": [8, 8]}, "crops need task.data.augment=true"),
        ({"classes": 1}, "task.data.classes=1: expected 2 to 255"),
        ({"ignore": [-1]}, r"task.data.ignore=\[-1\]"),
        ({"std": [0, 1, 1]}, "task.data.std"),
    ],
)
def test_bad_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**keys)


# ----------------------------------------------------------------------------------------------------------- models


def trained(job, tmp_path, batch=3):
    splits = job.splits(0)
    keys = {"max_steps": 3, "per_device_train_batch_size": batch, "per_device_eval_batch_size": 3, "use_cpu": True}
    arguments = TrainingArguments(
        tmp_path / "out", report_to="none", disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
        label_names=["labels"], dataloader_pin_memory=False, **keys,
    )  # fmt: skip
    model = job.build()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = Trainer(
        model, arguments, train_dataset=splits["train"], data_collator=job.collate,
        compute_metrics=job.metrics, preprocess_logits_for_metrics=job.reduce,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate(splits["test"])
    return model, before, {name.removeprefix("eval_"): value for name, value in found.items()}


@pytest.mark.parametrize("batch", [3, 1])
def test_it_trains_and_is_judged(data, tmp_path, batch):
    model, before, found = trained(task(data, ignore=[11], augment=True), tmp_path, batch)
    assert 0 <= found["mIoU"] <= found["mAcc"] <= 1 and found["loss"] > 0
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(name.startswith("backbone.encoder") for name in moved)
    assert any(name.startswith("auxiliary_head") for name in moved)


def test_what_the_metrics_say_is_what_the_whole_predictions_give(data, tmp_path):
    job = task(data, ignore=[11])
    model, _, found = trained(job, tmp_path)
    right = total = 0
    with torch.no_grad():
        for example in job.splits(0)["test"]:
            guess = model.eval()(pixel_values=example["pixel_values"][None]).logits[0].argmax(0)
            counted = example["labels"] != IGNORED
            right, total = right + (guess == example["labels"])[counted].sum(), total + counted.sum()
    assert found["accuracy"] == pytest.approx((right / total).item())


def test_a_classifiers_body_comes_from_a_folder_or_a_file(data, tmp_path):
    with warnings.catch_warnings():
        classifier = ConvNextV2ForImageClassification(
            ConvNextV2Config(**{k: v for k, v in TINY.items() if k != "model_type"})
        )
    classifier.save_pretrained(tmp_path / "classifier")
    job = replace(task(data, ignore=[11]), backbone=Pretrained(name=str(tmp_path / "classifier")))
    model = job.build()
    weights = classifier.convnextv2.encoder.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.backbone.encoder.state_dict().items())
    norms = [f"backbone.hidden_states_norms.stage{stage}" for stage in range(1, 5)]
    assert job.head(model) == ["decode_head", "auxiliary_head", *norms]


def test_any_segmentation_model_of_transformers(data):
    config = {
        "model_type": "segformer", "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 8, "sr_ratios": [2, 1, 1, 1],
    }  # fmt: skip
    job = task(data, model=config, backbone=None, ignore=[11])
    model = job.build()
    batch = job.collate([job.splits(0)["test"][0]] * 2)
    output = model(**batch)
    assert job.head(model) == ["decode_head"] and job.reduce(output.logits, batch["labels"]).shape == (2, 3, 3)


def test_a_named_model_brings_its_backbone():
    with pytest.raises(ValueError, match="task.backbone: a named model"):
        replace(task("", classes=3), model=Pretrained(name="some/upernet")).build()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "bert"}, "bert: .*"),
        ({"model_type": "convnextv3"}, "convnextv3: transformers has no such model_type; nearest: convnextv2, .*"),
        ({"model_type": 3}, "3: transformers has no such model_type"),
        ({"model_type": "cifar_resnet", "dept": 8}, "cifar_resnet: CifarResNetConfig has no 'dept'; nearest: depth"),
        ({**TINY, "depth": [1] * 4}, "convnextv2: ConvNextV2Config has no 'depth'; nearest: depths.*"),
        ({"model_type": "cifar_resnet", "depth": 9}, "cifar_resnet: depth=9: expected 6 n .*"),
        ({**TINY, "depths": "deep"}, "convnextv2: .*depths.*"),
    ],
)
@pytest.mark.parametrize("place", ["model", "backbone"])
def test_a_config_that_cannot_be(place, keys, message):
    job = task("", classes=3, **({"model": keys, "backbone": None} if place == "model" else {"backbone": keys}))
    with pytest.raises(ValueError) as refused:
        job.build()
    assert re.fullmatch(f"config.model_type={message}", str(refused.value)) and len(str(refused.value)) < 450


def test_keys_that_every_config_takes_and_names_that_stand_for_others():
    given = {
        "out_features": ["stage2", "stage4"],
        "num_labels": 2,
        "id2label": {0: "cat", 1: "dog"},
        "dtype": "float32",
    }
    given |= {"num_hidden_layers": 4, "attn_implementation": "eager", "output_hidden_states": False}
    config = make_config(TINY | given, num_labels=2)
    assert config.num_stages == 4 and config.out_features == ["stage2", "stage4"] and config.id2label[1] == "dog"
    assert (
        make_config({"model_type": "llama", "rope_theta": 1.0}).rope_parameters["rope_theta"] == 1.0
    )  # as it was once
