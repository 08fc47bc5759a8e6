"""Instance segmentation: COCO files read and refused, the detector's two modes, COCO's precisions, and training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask
from transformers import EvalPrediction, Trainer, TrainingArguments

from flora_lab.tasks.data.coco_check import run_lengths
from flora_lab.tasks.evaluation import coco_precision
from flora_lab.tasks.instance_segmentation import CocoImages, Detector, InstanceSegmentation
from flora_lab.tasks.models.pretrained import Pretrained

BODY = {"model_type": "cifar_resnet", "depth": 8, "widths": [4, 8, 8]}
SMALL = {
    "channels": 8, "hidden": 8, "anchors": [8, 16, 32], "size": [32], "longest": 64, "proposals": 20, "samples": 16,
    "detections": 5,
}  # fmt: skip


def squares(number, height=32, width=40):
    """(left, top, width, height) of an image's two objects; the first is of category 3, the second of 7."""
    return [(2 + number, 4, 10, 12), (20, 10 + number, 14, 9)]


def drawn(box, height=32, width=40):
    left, top, wide, high = box
    array = np.zeros((height, width), "uint8")
    array[top : top + high, left : left + wide] = 1
    return array


def content(count, mode="rle"):
    """A COCO file of `count` images. The masks are run lengths, or polygons."""
    images, annotations = [], []
    for number in range(count):
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": 32, "width": 40})
        for category, box in zip((3, 7), squares(number), strict=True):
            left, top, wide, high = box
            packed = mask.encode(np.asfortranarray(drawn(box)))
            ring = [left, top, left + wide, top, left + wide, top + high, left, top + high]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number + 1, "category_id": category, "bbox": list(box),
                "area": wide * high, "iscrowd": 0,
                "segmentation": [ring] if mode == "polygon" else {**packed, "counts": packed["counts"].decode()},
            })  # fmt: skip
    categories = [{"id": 7, "name": "low"}, {"id": 3, "name": "high"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder, split, told, count):
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        array = np.zeros((32, 40, 3), "uint8")
        for shade, box in zip((250, 120), squares(number), strict=True):
            array[drawn(box) > 0] = shade
        Image.fromarray(array).save(folder / split / f"{number}.png")
    (folder / f"{split}.json").write_text(json.dumps(told))


def tiny_data(folder):
    """Makes COCO data of two categories in ``folder``; the overrides that make any instance segmentation YAML run on
    them in seconds."""
    write(folder, "train", content(6), 6)
    write(folder, "val", content(3, "polygon"), 3)
    detector = {"channels": 8, "hidden": 8, "longest": 64, "proposals": 20, "samples": 16, "detections": 5}
    return [
        f"task.data.path={folder}",
        "task.data.train_examples=null",
        "task.data.validation_examples=null",
        "task.data.test_examples=null",
        "task.data.validation_share=0.25",
        "task.backbone.name=null",
        "task.backbone.weights=null",
        "task.backbone.config={model_type: cifar_resnet, depth: 8, widths: [4, 8, 8]}",
        "task.backbone.config.out_features=[stage1,stage2,stage3]",
        "task.detector.anchors=[8,16,32]",
        "task.detector.size=[32]",
        *(f"task.detector.{name}={value}" for name, value in detector.items()),
        "training.batch_size=2",
        "training.eval_batch_size=2",
        "training.loaders=0",
        "training.mixed_precision='no'",
        "budget=500",
    ]


def task(path, detector=SMALL, backbone=BODY, **data):
    return InstanceSegmentation(
        backbone=Pretrained(config=dict(backbone)),
        detector=Detector(**detector),
        data=CocoImages(path=str(path), **data),
    )


@pytest.fixture
def data(tmp_path):
    tiny_data(tmp_path)
    return tmp_path


def told(path, split="train"):
    return json.loads((path / f"{split}.json").read_text())


# ------------------------------------------------------------------------------------------------------------- data


def test_three_splits_whose_objects_are_where_they_are_drawn(data):
    job = task(data)
    splits = job.splits(0)
    assert {name: len(some) for name, some in splits.items()} == {"train": 5, "validation": 1, "test": 3}
    assert [category["id"] for category in job.source.categories] == [3, 7]
    example = splits["train"][0]
    assert example["classes"].tolist() == [1, 2] and example["sizes"] == [32, 40]
    for (left, top, right, bottom), there, shade in zip(
        example["boxes"].int(), example["masks"], (250, 120), strict=True
    ):
        assert there.sum() == (right - left) * (bottom - top) and there[top:bottom, left:right].all()
        assert torch.equal((example["pixel_values"][0] * 255).round() == shade, there.bool())
    assert "boxes" not in splits["test"][0]


def test_polygons_and_run_lengths_are_one_mask(data):
    for one in (images := task(data).source.images)[6:]:
        same = next(image for image in images[:6] if image.boxes == one.boxes)
        assert all(torch.equal(a, b) for a, b in zip(one.objects(), same.objects(), strict=True))


def test_what_is_mirrored_stays_aligned(data):
    train = task(data, augment=True).splits(0)["train"]
    for example in (train[0] for _ in range(10)):
        left, top, right, bottom = example["boxes"][0].int()
        assert (example["pixel_values"][0, top:bottom, left:right] > 0.9).all()
        assert example["masks"][0, top:bottom, left:right].all()


def test_a_batch_is_padded_to_its_largest(data):
    job = task(data)
    one, two = (dict(job.splits(0)["train"][index]) for index in (0, 1))
    one |= {"pixel_values": one["pixel_values"][:, :20, :30], "sizes": [20, 30], "boxes": one["boxes"][:1]}
    one |= {"classes": one["classes"][:1], "masks": one["masks"][:1, :20, :30]}
    batch = job.collate([one, two])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "pixel_values": (2, 3, 32, 40), "sizes": (2, 2), "labels": (2,), "boxes": (2, 2, 4), "classes": (2, 2),
        "masks": (2, 2, 32, 40),
    }  # fmt: skip
    assert batch["classes"][0, 1] == 0 and batch["sizes"].tolist() == [[20, 30], [32, 40]]


def test_crowds_are_not_trained_on_and_count_nothing(data):
    crowded = told(data)
    crowded["annotations"][0]["iscrowd"] = 1
    (data / "train.json").write_text(json.dumps(crowded))
    job = task(data)
    assert [len(image.objects()[1]) for image in job.source.images[:2]] == [1, 2]
    assert judged(job, perfect(job, [0]))["AP50"] == pytest.approx(1)


def test_the_layout_of_coco_itself(tmp_path):
    for name in ("train2017", "val2017"):
        write(tmp_path, name, content(3), 3)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").rename(tmp_path / "annotations" / f"instances_{name}.json")
    assert {name: len(some) for name, some in task(tmp_path, validation_share=0.4).splits(0).items()} == {
        "train": 2, "validation": 1, "test": 3,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- metrics


def perfect(job, places):
    """What a detector that makes no mistake would answer: boxes filled with ones."""
    count, n = len(places), 4
    boxes, scores = np.zeros((count, n, 4), "float32"), np.zeros((count, n), "float32")
    classes, masks = np.zeros((count, n), int), np.zeros((count, n, 28, 28), "float32")
    for row, place in enumerate(places):
        found, numbers, _ = job.source.images[place].objects()
        size = len(numbers)
        boxes[row, :size], classes[row, :size] = found, numbers
        scores[row, :size], masks[row, :size] = 0.9, 1
    return (boxes, scores, classes, masks), np.array(places)


def judged(job, answer):
    return job.metrics(EvalPrediction(*answer))


def test_a_perfect_detector_has_only_ones(data, capsys):
    job = task(data)
    found = judged(job, perfect(job, [6, 7, 8]))
    names = {"mAP", "AP50", "AP75", "APs"}  # there are small objects only
    assert found.keys() == names | {f"box_{name}" for name in names}
    assert [found[f"box_{name}"] for name in names] == pytest.approx([1] * 4)
    assert found["AP50"] == pytest.approx(1)  # torchvision pastes to whole pixels, so .95 is for larger objects
    segments = [
        {"image_id": place, "category_id": number, "score": 0.9, "segmentation": image.rle(index)}
        for place, image in enumerate(job.source.images[:2])
        for index, number in enumerate(image.classes)
    ]
    exact = coco_precision.precisions(coco_precision.truth_of(job.source, [0, 1]), segments, "segm", 10)
    assert list(exact.values()) == pytest.approx([1] * 4)
    assert capsys.readouterr().out == ""


def test_one_object_missed_in_four(data):
    """Of a category's four objects in as many images three are found: recall ends at 0.75, where precision is 1."""
    job = task(data)
    (boxes, scores, classes, masks), places = perfect(job, [0, 1, 2, 3])
    scores[0] = 0
    found = judged(job, ((boxes, scores, classes, masks), places))
    assert found["box_mAP"] == pytest.approx(76 / 101)  # recalls 0, .01, ..., .75 of 101


def test_a_false_alarm_before_the_only_hit_halves_the_precision(data):
    job = task(data)
    (boxes, scores, classes, masks), places = perfect(job, [6])
    boxes[0, 2:], classes[0, 2:], scores[0, 2:], masks[0, 2:] = [0, 0, 3, 3], [1, 2], 0.95, 1
    found = judged(job, ((boxes, scores, classes, masks), places))
    assert found["box_mAP"] == pytest.approx(0.5) and found["AP50"] == pytest.approx(0.5)


def test_nothing_found_is_zero(data):
    job = task(data)
    (boxes, scores, classes, masks), places = perfect(job, [6])
    found = judged(job, ((boxes, scores * 0, classes, masks), places))
    assert found["mAP"] == found["box_mAP"] == 0


# -------------------------------------------------------------------------------------------------------- bad data


def spoiled(path, part, row, key, value, split="train"):
    changed = told(path, split)
    changed[part][row][key] = value
    (path / f"{split}.json").write_text(json.dumps(changed))


def test_a_missing_part_or_key_is_named(data):
    changed = told(data)
    del changed["annotations"][3]["bbox"]
    (data / "train.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"train\.json, annotations, row 3: no 'bbox'"):
        task(data).splits(0)
    for text, message in (
        ("[]", r": \[\], expected an object with images, annotations, categories"),
        ("{", ": not JSON"),
        ("{}", ": no 'images'"),
        ('{"images": []}', r": images=\[\], expected a list of one or more"),
        ('{"images": [1], "annotations": [1], "categories": [1]}', r", images, row 0: 1, expected an object with id, "),
    ):
        (data / "train.json").write_text(text)
        with pytest.raises(ValueError, match=rf"train\.json{message}"):
            task(data).splits(0)


NAN, WHOLE, RLE = float("nan"), "expected a whole number", {"size": [32, 40]}
BAD = {
    "images": [
        (0, "id", [1], r"train\.json, images, row 0: id=\[1\], expected a whole number or text"),
        (1, "id", 1, r"train\.json: two images have the id 1"),
        (0, "width", None, f"row 0: width=None, {WHOLE} from 1"),
        (0, "width", "40", f"row 0: width='40', {WHOLE} from 1"),
        (0, "width", -40, f"row 0: width=-40, {WHOLE} from 1"),
        (0, "height", 32.0, rf"row 0: height=32\.0, {WHOLE} from 1"),
        (1, "width", 50, r"image 2 \(.*1\.png\): the image is 40 × 32, not 50 × 32"),
        (0, "file_name", None, "row 0: file_name=None, expected text"),
        (0, "file_name", 5, "row 0: file_name=5, expected text"),
        (0, "file_name", "", "row 0: file_name='', expected text"),
        (1, "file_name", "gone.png", r"train\.json, image 2: there is no file .*gone\.png"),
        (1, "file_name", ".", r"train\.json, image 2: there is no file .*train"),
    ],
    "categories": [
        (0, "id", "7", f"categories, row 0: id='7', {WHOLE}$"),
        (0, "id", 3, r"train\.json: two categories have the id 3"),
        (0, "name", 5, "categories, row 0: name=5, expected text"),
        (0, "name", "other", r"val\.json: categories differ from the other splits' in \(7, 'low'\)"),
    ],
    "annotations": [
        (2, "image_id", [1], r"annotations, row 2: image_id=\[1\], expected a whole number or text"),
        (2, "image_id", 99, r"train\.json, annotations, row 2: image_id=99, there is no such image"),
        (2, "image_id", "1", "row 2: image_id='1', there is no such image"),
        (2, "category_id", [3], rf"row 2: category_id=\[3\], {WHOLE}$"),
        (2, "category_id", True, rf"row 2: category_id=True, {WHOLE}$"),
        (2, "category_id", 5, "row 2: category_id=5, expected one of 3, 7"),
        (2, "area", "big", "row 2: area='big', expected a number from 0"),
        (2, "area", NAN, "row 2: area=nan, expected a number from 0"),
        (2, "iscrowd", "0", "row 2: iscrowd='0', expected 0 or 1"),
        (2, "bbox", [2, 4, None, 12], r"row 2: bbox=\[.*\], expected left, top, width and height"),
        (2, "bbox", [2, 4, NAN, 12], r"row 2: bbox=\[.*\], expected left, top, width and height"),
        (2, "bbox", [10**400, 4, 1.5, 12], r"row 2: bbox=\[.*\], expected left, top, width and height"),
        (2, "bbox", [2, 4, 12], r"row 2: bbox=\[2, 4, 12\], expected left, top, width and height"),
        (2, "bbox", [38, 4, 10, 12], r"row 2: bbox=\[38, 4, 10, 12\] is outside its image of 40 × 32"),
        (2, "bbox", [2, 4, 0, 12], r"row 2: bbox=\[.*\] has no area in .*; task.data.drop_empty=true leaves"),
        (2, "bbox", [40, 4, 1, 5], r"row 2: bbox=\[40, 4, 1, 5\] has no area in its image of 40 × 32"),
        (2, "bbox", [-1, 4, 1, 5], r"row 2: bbox=\[-1, 4, 1, 5\] has no area"),
        (2, "bbox", [20, 4, 1e-9, 5], r"row 2: bbox=\[20, 4, 1e-09, 5\] has no area"),
        (2, "segmentation", [], "row 2: segmentation=.*, expected polygons of three or more points, or run lengths"),
        (2, "segmentation", [[1, 2, 3, 4]], "row 2: segmentation=.*, expected polygons of three or more points"),
        (2, "segmentation", [[None] * 6], "row 2: segmentation=.*, expected polygons of three or more points"),
        (2, "segmentation", [["1"] * 6], "row 2: segmentation=.*, expected polygons of three or more points"),
        (2, "segmentation", [[NAN] * 6], "row 2: segmentation=.*, expected polygons of three or more points"),
        (2, "segmentation", [[1e30, 0, 0, 1e30, 5, 5]], "row 2: segmentation=.* is outside its image of 40 × 32"),
        (2, "segmentation", [[50, 1, 59, 1, 59, 9]], "row 2: segmentation=.* is outside its image of 40 × 32"),
        (2, "segmentation", [[1, 1, 9, 1, 9, 34]], "row 2: segmentation=.* is outside its image of 40 × 32"),
        (2, "segmentation", {"size": [40, 32], "counts": "x"}, r"row 2: segmentation\.size=\[40, 32\], .*, \[32, 40\]"),
        (2, "segmentation", {**RLE, "counts": ["a"]}, "row 2: segmentation=.*, expected polygons .*, or run lengths"),
        (2, "segmentation", {**RLE, "counts": [0.5, 1279.5]}, "row 2: segmentation=.*, expected polygons"),
        (2, "segmentation", {"counts": [5, 1275]}, r"row 2: segmentation\.size=None, .*, \[32, 40\]"),
        (2, "segmentation", {**RLE, "counts": [1280]}, "row 2: segmentation=.* has no area"),
        *(
            (2, "segmentation", {**RLE, "counts": counts}, "row 2: .*counts=.*, expected lengths .* 40 × 32 pixels")
            for counts in ([3, 4], [100, -50, 1230], [], "1", "11", "", "zzzz", "é", "o", "0\ud800")
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("part", "row", "key", "value", "message"), [(p, *one) for p in BAD for one in BAD[p]])
def test_bad_data_is_named_before_training(data, part, row, key, value, message):
    if (key, value) == ("width", 50):
        for annotation in (changed := told(data))["annotations"]:
            if annotation["image_id"] == 2:
                annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        (data / "train.json").write_text(json.dumps(changed))
    spoiled(data, part, row, key, value)
    job = task(data)
    with pytest.raises(ValueError, match=message) as raised:
        job.check(job.splits(0))
    assert len(str(raised.value).replace(str(data), "")) < 200


@pytest.mark.parametrize("value", [None, 0.5])
def test_area_and_iscrowd_may_be_left_out(data, value):
    changed = told(data)
    changed["annotations"][0] |= {"area": value, "iscrowd": None}
    del changed["annotations"][1]["area"], changed["annotations"][1]["iscrowd"]
    (data / "train.json").write_text(json.dumps(changed))
    image = task(data).source.images[0]
    assert image.areas == [value, None] and image.crowds == [False, False]


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them():
    for seed, share in enumerate([0, 0.01, 0.1, 0.5, 0.9, 1] * 3):
        there = np.random.default_rng(seed).random((70, 90)) < share
        flat = np.concatenate([[False], there.T.ravel(), [not there[-1, -1]]])
        ends = np.flatnonzero(np.diff(flat))
        packed = mask.encode(np.asfortranarray(there.astype("uint8")))
        assert run_lengths(packed["counts"].decode()) == np.diff([0, *ends]).tolist()


def changed_objects(path, change, split):
    content = told(path, split)
    content["annotations"] = [one for one in content["annotations"] if change(one) is not False]
    (path / f"{split}.json").write_text(json.dumps(content))


def test_a_split_of_crowds_has_no_object(data):
    changed_objects(data, lambda one: one.update(iscrowd=1), "val")
    with pytest.raises(ValueError, match=r"val\.json: the test split has no object to evaluate"):
        task(data).splits(0)
    changed_objects(data, lambda one: one.update(iscrowd=1), "train")
    with pytest.raises(ValueError, match=r"train\.json: the train split has no object to learn from"):
        task(data).splits(0)


def test_a_drawn_validation_split_without_objects(data):
    (place,) = task(data).splits(0)["validation"].records.dataset["place"]
    changed_objects(data, lambda one: one["image_id"] != place + 1, "train")
    with pytest.raises(ValueError, match=r"train\.json: the validation split has no object to evaluate"):
        task(data).splits(0)


def test_a_class_of_test_alone(data):
    def to(**keys):
        return lambda one: one["category_id"] != 7 or one.update(keys)

    changed_objects(data, to(iscrowd=1), "train")
    with pytest.raises(ValueError, match=r"\.json, annotations, row 1: category_id=7 is not in the train split"):
        task(data).splits(0)
    changed_objects(data, to(iscrowd=1), "val")
    assert len(task(data).splits(0)["test"]) == 3


def test_a_corrupt_image_is_named(data):
    file = data / "train" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    job = task(data)
    with pytest.raises(ValueError, match=r"train\.json, image 3 \(.*2\.png\): .* is not a readable image"):
        job.check(job.splits(0))


@pytest.mark.parametrize(
    ("key", "value"), [("bbox", [2, 4, 0, 12]), ("bbox", [40, 4, 1, 5]), ("segmentation", {**RLE, "counts": [1280]})]
)
def test_objects_without_area_can_be_left_out(data, key, value):
    spoiled(data, "annotations", 2, key, value)
    assert [len(image.boxes) for image in task(data, drop_empty=True).source.images[:3]] == [2, 1, 2]


def test_a_folder_without_coco_files(tmp_path):
    with pytest.raises(ValueError, match=r"expected NAME\.json .* found none"):
        task(tmp_path).splits(0)


def test_bad_keys(data):
    with pytest.raises(ValueError, match=r"task\.detector\.anchors=\[8\]: expected 3 sides"):
        task(data, {**SMALL, "anchors": [8]}).build()
    with pytest.raises(ValueError, match=r"task\.detector\.size=\[\]"):
        Detector(size=[])
    with pytest.raises(ValueError, match=r"task\.data\.mean"):
        CocoImages(mean=[0.5])


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("bf16", [False, True])
def test_it_trains_and_is_judged(data, tmp_path, bf16):
    job = task(data, augment=True)
    splits, model = job.splits(0), job.build()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path / "out", report_to="none", disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
        label_names=["labels"], dataloader_pin_memory=False, use_cpu=True, bf16=bf16, max_steps=2,
        per_device_train_batch_size=2, per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=splits["train"], data_collator=job.collate, compute_metrics=job.metrics
    )
    trainer.train()
    found = trainer.evaluate(splits["test"])
    assert 0 <= found["eval_mAP"] <= found["eval_AP50"] <= 1 and 0 <= found["eval_box_mAP"] <= 1
    for part in ("body.layer1", "body.layer3", "fpn", "rpn", "roi_heads.mask_head"):
        assert any(not torch.equal(w, before[name]) for name, w in model.named_parameters() if name.startswith(part))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert job.outputs(model.eval(), [splits["test"][0]]).requires_grad


def test_an_image_without_objects_trains(data):
    changed = told(data)
    changed["annotations"] = [one for one in changed["annotations"] if one["image_id"] != 1]
    (data / "train.json").write_text(json.dumps(changed))
    job = task(data)
    train = job.splits(0)["train"]
    examples = [train[index] for index in range(len(train))]
    empty = next(example for example in examples if not len(example["classes"]))
    for batch in ([empty], [empty, examples[0]]):
        assert job.build()(**job.collate(batch))["loss"].isfinite()


def test_detections_of_one_image_are_the_same_in_a_batch_of_other_sizes(data):
    """And in pixels of the image as it is, however it was scaled."""
    job = task(data, {**SMALL, "size": [48]})
    model, example = job.build().eval(), job.splits(0)["test"][0]
    small = {**example, "pixel_values": example["pixel_values"][:, :24, :30], "sizes": [24, 30]}
    with torch.no_grad():
        alone, both = (model(**job.collate(some)) for some in ([small], [small, example]))
    assert alone["masks"].shape[2:] == (28, 28) and alone["boxes"].shape[:2] == alone["scores"].shape == (1, 5)
    assert torch.allclose(alone["boxes"][0], both["boxes"][0], atol=1e-3)
    assert alone["boxes"][..., 0::2].max() <= 30 and alone["boxes"][..., 1::2].max() <= 24


def test_the_head_is_all_but_the_backbone(data):
    convnext = {"model_type": "convnextv2", "hidden_sizes": [8] * 4, "depths": [1] * 4, "patch_size": 2}
    job = task(data, {**SMALL, "anchors": [4, 8, 16, 32, 64]}, convnext)
    model = job.build()
    parts = tuple(f"{name}." for name in job.head(model))
    rest = {name.split(".")[0] for name, _ in model.named_parameters() if not name.startswith(parts)}
    assert rest == {"body"} and "body.hidden_states_norms.stage4" in job.head(model)


def test_a_body_of_timm(data):
    job = task(
        data, {**SMALL, "anchors": [8, 16, 32, 64]}, {"model_type": "timm_backbone", "backbone": "test_convnext"}
    )
    model = job.build()
    assert model(**job.collate([job.splits(0)["train"][0]]))["loss"].isfinite()
