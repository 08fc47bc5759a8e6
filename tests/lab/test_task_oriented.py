"""Oriented detection: DOTA's files read and refused, tiles and rectangles, Task-1 precision, and training."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Trainer, TrainingArguments

from flora_lab.tasks.data import dota
from flora_lab.tasks.models.pretrained import Pretrained
from flora_lab.tasks.oriented_detection import AerialImages, OrientedDetection, RotatedDetector

needs_rotated_iou = pytest.mark.skipif(
    not hasattr(__import__("torchvision").ops.boxes, "_box_cxcywhr_to_xywhr"), reason="torchvision before 0.27"
)

BODY = {"model_type": "cifar_resnet", "depth": 8, "widths": [4, 8, 8], "out_features": ["stage2", "stage3"]}
SMALL = {"channels": 8, "hidden": 8, "anchor": 4, "proposals": 30, "samples": 16, "detections": 10}
SHIP, PLANE = [10, 12, 26, 20, 22, 28, 6, 20], [40, 8, 52, 8, 52, 30, 40, 30]


def line(quad, name="ship", difficult=0):
    return f"{' '.join(map(str, quad))} {name} {difficult}"


def write(folder, *lines, name="P1", size=(64, 48)):
    for part in ("images", "labelTxt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size)
    for text in lines:
        try:
            ImageDraw.Draw(picture).polygon(list(map(float, text.split()[:8])), fill=(250, 200, 0))
        except ValueError:
            pass  # a bad line
    picture.save(folder / "images" / f"{name}.png")
    (folder / "labelTxt" / f"{name}.txt").write_text("imagesource:none\ngsd:0.5\n" + "\n".join(lines) + "\n")


def tiny_data(folder):
    """Makes two splits of DOTA data in ``folder``; the overrides that make any oriented detection YAML run on them in
    seconds."""
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            write(folder / split, line(SHIP), line(PLANE, "plane"), name=f"P{number}")
    return [
        f"task.data.path={folder}",
        "task.data.tile=48",
        "task.data.overlap=16",
        "task.data.overfit=false",
        "task.data.validation_share=0.34",
        "task.backbone.name=null",
        "task.backbone.weights=null",
        "task.backbone.config={model_type: cifar_resnet, depth: 8, widths: [4, 8, 8], out_features: [stage2, stage3]}",
        *(f"task.detector.{name}={value}" for name, value in SMALL.items()),
        "training.batch_size=2",
        "training.eval_batch_size=2",
        "training.loaders=0",
        "training.mixed_precision='no'",
        "budget=500",
    ]


def task(path, backbone=BODY, detector=SMALL, **data):
    keys = {"tile": 48, "overlap": 16, "validation_share": 0.34, **data}
    return OrientedDetection(
        backbone=Pretrained(config=dict(backbone)),
        detector=RotatedDetector(**detector),
        data=AerialImages(path=str(path), **keys),
    )


@pytest.fixture
def data(tmp_path):
    tiny_data(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- data


def test_objects_are_read_with_spaces_and_commas(tmp_path):
    write(tmp_path, line(SHIP), ", ".join([*map(str, PLANE), "plane", "2"]), line(SHIP, "airport"))
    source = dota.read(tmp_path, [], ["airport"], False)
    (image,) = source.images
    assert source.classes == ["plane", "ship"] and source.splits == {"train": range(1)}
    assert image.quads == [SHIP, PLANE] and image.classes == [2, 1] and image.difficult == [False, True]
    assert image.rows[1].endswith("P1.txt, line 4") and (image.width, image.height) == (64, 48)


BAD = [
    ("1 2 3 ship 0", "has 5 fields, expected x1 y1 x2 y2 x3 y3 x4 y4 class difficult"),
    (line([10, "a", *SHIP[2:]]), "'a' is not a number, expected x1 y1"),
    (line(["nan", *SHIP[1:]]), "has a corner that is not finite"),
    (line(SHIP, difficult="x"), "difficult is 'x', expected 0"),
    (
        line([x + 70 for x in SHIP]),
        "has more than half of its width or height outside the image of 64 × 48; task.data.drop_bad=true leaves",
    ),
    (line([-x for x in SHIP]), "outside the image of 64 × 48"),
    (line([-5000, -5000, 5000, -5000, 5000, 5000, -5000, 5000]), "outside the image of 64 × 48"),
    (line([10, 10, 300, 10, 300, 30, 10, 30]), "outside the image of 64 × 48"),  # 300 for 30
    (line([10, 10, 20, 10, 10, 20, 20, 20]), "is not convex: its corners are not in order"),  # a bow tie
    (line([10, 10, 30, 10, 30, 30, 25, 12]), "is not convex: its corners are not in order around it"),
    (line([10, 10, 10, 10, 10, 10, 10, 10]), "has an area below one pixel"),
    (line([10, 10, 20, 20, 30, 30, 15, 15]), "has an area below one pixel"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_object_is_named(tmp_path, text, message):
    write(tmp_path, line(SHIP), text)
    with pytest.raises(ValueError) as raised:
        dota.read(tmp_path, [], [], False)
    assert message in str(raised.value) and str(raised.value).startswith(
        f"{tmp_path / 'labelTxt' / 'P1.txt'}, line 4: "
    )
    if "drop_bad" in str(raised.value):
        assert dota.read(tmp_path, [], [], True).images[0].quads == [SHIP]


def test_classes_and_files_that_do_not_fit_are_named(data):
    with pytest.raises(ValueError, match=r"P0\.txt, line 4: class 'plane', expected one of ship, car"):
        dota.read(data, ["ship", "car"], [], False)
    write(data / "val", line(SHIP, "car"), name="P7")
    job = task(data)
    with pytest.raises(ValueError, match=r"P7\.txt, line 3: class 'car' is not in the train split"):
        job.splits(0)
    (data / "val" / "labelTxt" / "P7.txt").rename(data / "val" / "labelTxt" / "P8.txt")
    with pytest.raises(ValueError, match=r"P7\.png: there is no text file of that name"):
        dota.read(data, [], [], False)
    (data / "val" / "images" / "P7.png").unlink()
    with pytest.raises(ValueError, match=r"P8\.txt: there is no picture of that name"):
        dota.read(data, [], [], False)
    (data / "train" / "labelTxt-v1.5").mkdir()
    with pytest.raises(ValueError, match="expected one folder labelTxt, there are labelTxt, labelTxt-v1.5"):
        dota.read(data, [], [], False)
    with pytest.raises(ValueError, match="expected images/ and labelTxt/ in it, or in train/ and val/"):
        dota.read(data / "train" / "images", [], [], False)


def test_an_image_that_does_not_open_is_named(data):
    file = data / "val" / "images" / "P0.png"
    content = file.read_bytes()
    file.write_bytes(content[:60])
    job = task(data)
    with pytest.raises(ValueError, match=r"P0\.png: column 'image' is not a readable image"):
        job.check(job.splits(0))
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"P0\.png: not a readable image"):
        task(data).splits(0)


def test_splits_without_objects_are_named(tmp_path):
    write(tmp_path / "train", line(SHIP), name="P0")
    write(tmp_path / "train", line(SHIP), name="P1")
    write(tmp_path / "val", line(SHIP, difficult=1))
    with pytest.raises(ValueError, match="the test split has no object to evaluate"):
        task(tmp_path, validation_share=0.5).splits(0)
    assert task(tmp_path, overfit=True).splits(0)["test"]
    with pytest.raises(ValueError, match="no tile has 70% of an object; task.data.tile is too small"):
        write(tmp_path / "val", line([0, 0, 64, 0, 64, 48, 0, 48]), name="P1", size=(64, 48))
        write(tmp_path / "train", line([0, 0, 64, 0, 64, 48, 0, 48]), name="P0")
        write(tmp_path / "train", line([0, 0, 64, 0, 64, 48, 0, 48]), name="P1")
        task(tmp_path, tile=32, overlap=0, validation_share=0.5).splits(0)


def test_bad_keys():
    for keys, message in (
        ({"overlap": 1024}, "task.data.overlap=1024: expected less than task.data.tile=1024"),
        ({"share": 0.0}, "task.data.share=0.0"),
        ({"mean": [0.5], "std": [0.5]}, "task.data.mean"),
    ):
        with pytest.raises(ValueError, match=message):
            AerialImages(**keys)
    with pytest.raises(ValueError, match="task.detector.overlap=2"):
        RotatedDetector(overlap=2)


def test_the_package_that_is_missing_is_named(data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"oriented_det is not installed: pip install 'flora-peft\[oriented\]'"):
        task(data).splits(0)


# --------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("width", "height"), [(10, 20), (48, 48), (64, 48), (150, 333), (97, 48)])
def test_tiles_cover_a_picture_and_stay_in_it(width, height):
    tiles = dota.tiles_of(3, dota.AerialImage("", "", width, height), 48, 16)
    covered = np.zeros((height, width), dtype=int)
    for place, left, top in tiles:
        assert place == 3 and left + 48 <= max(48, width) and top + 48 <= max(48, height)
        covered[top : top + 48, left : left + 48] += 1
    assert covered.min() == 1 and len(set(tiles)) == len(tiles)


def random_boxes(count, seed=0):
    draw = np.random.default_rng(seed)
    sides = np.sort(draw.uniform(3, 30, (count, 2)), axis=1)[:, ::-1]
    return np.concatenate([draw.uniform(20, 80, (count, 2)), sides, draw.uniform(-1.57, 1.57, (count, 1))], 1)


def test_a_rectangle_is_found_from_its_corners():
    boxes = random_boxes(50)
    corners = dota.corners(boxes)
    np.testing.assert_allclose(dota.rectangles(corners), boxes, atol=1e-9)
    np.testing.assert_allclose(dota.rectangles(corners[:, ::-1]), boxes, atol=1e-9)
    assert dota.rectangles(np.zeros((0, 4, 2))).shape == (0, 5)


def test_the_smallest_rectangle_holds_a_quadrilateral():
    rng = np.random.default_rng(0)
    quads = dota.corners(random_boxes(50)) + rng.uniform(-0.6, 0.6, (50, 4, 2))
    found = dota.rectangles(quads)
    turned = quads - found[:, None, :2]
    cos, sin = np.cos(found[:, 4]), np.sin(found[:, 4])
    along = turned[..., 0] * cos[:, None] + turned[..., 1] * sin[:, None]
    across = turned[..., 1] * cos[:, None] - turned[..., 0] * sin[:, None]
    np.testing.assert_allclose(np.ptp(along, axis=1), found[:, 2])
    np.testing.assert_allclose(np.ptp(across, axis=1), found[:, 3])
    angles = np.linspace(0, np.pi / 2, 2000)  # no other angle has a smaller one
    axes = np.stack([np.cos(angles), np.sin(angles)], -1)
    sides = [np.ptp(np.einsum("ad,nkd->nak", turn, quads), axis=2) for turn in (axes, axes[:, ::-1] * [-1, 1])]
    assert (found[:, 2] * found[:, 3] <= (sides[0] * sides[1]).min(1) + 1e-9).all()
    assert (found[:, 2] >= found[:, 3]).all() and (abs(found[:, 4]) <= np.pi / 2).all()


@needs_rotated_iou
def test_overlaps_are_torchvisions():
    from torchvision.ops import box_iou

    from flora_lab.tasks.evaluation.dota_precision import overlap

    one, other = random_boxes(20), random_boxes(30, seed=1)
    degrees = [np.concatenate([boxes[:, :4], -np.degrees(boxes[:, 4:])], 1) for boxes in (one, other)]
    second = box_iou(*map(torch.as_tensor, degrees), fmt="cxcywhr").numpy()
    found = overlap(dota.corners(one), dota.corners(other))
    np.testing.assert_allclose(found, second, atol=1e-4)
    assert found.max() > 0.2 and overlap(np.zeros((0, 4, 2)), dota.corners(one)).shape == (0, 20)


# -------------------------------------------------------------------------------------------------------- precision


def pictures(seed, kinds=2):
    """Truth and detections of three pictures: near the truth, with scores, some missing and some wrong."""
    from flora_lab.tasks.evaluation.dota_precision import Boxes

    draw = np.random.default_rng(seed)
    truth, found = [], []
    for number in range(3):
        boxes = random_boxes(12, seed=10 * seed + number)
        classes, difficult = draw.integers(1, kinds + 1, 12), draw.random(12) < 0.2
        truth.append(Boxes(dota.corners(boxes), classes, difficult=difficult))
        near = boxes + draw.normal(0, [1, 1, 1, 1, 0.05], (12, 5)) * draw.uniform(0, 2, (12, 1))
        near = np.concatenate([near[draw.random(12) < 0.8], random_boxes(3, seed=99), near[:2] + 0.3])
        kept = np.concatenate([classes, [1] * 3, classes[:2]])[: len(near)]
        found.append(Boxes(dota.corners(near), kept, draw.random(len(near))))
    return truth, found


@pytest.mark.parametrize("seed", range(3))
def test_precisions_are_those_of_the_package(seed):
    """oriented-det's own evaluation: one threshold, 11 points. It knows no quadrilaterals, but these are rectangles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from oriented_det.data.evaluation import Detection, GroundTruth, compute_oriented_map
        from oriented_det.geometry import RBox

    from flora_lab.tasks.evaluation.dota_precision import precisions

    truth, found = pictures(seed)
    theirs = [{}, {}]
    for n, (real, one) in enumerate(zip(truth, found, strict=True)):
        rows = zip(dota.rectangles(real.quads), real.classes.tolist(), real.difficult.tolist(), strict=True)
        theirs[1][n] = [GroundTruth(RBox(*box), kind, str(kind), int(hard), n) for box, kind, hard in rows]
        rows = zip(dota.rectangles(one.quads), one.classes.tolist(), one.scores.tolist(), strict=True)
        theirs[0][n] = [Detection(RBox(*box), score, kind, str(kind), n) for box, kind, score in rows]
    ours = precisions(truth, found)
    for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
        mean, _, _ = compute_oriented_map(*theirs, iou_threshold=iou, show_progress=False)
        assert ours[name] == pytest.approx(mean, abs=1e-6)
    assert ours["AP75"] < ours["AP50"] < 1 and 0 < ours["mAP"] < ours["AP50"]


def test_precision_of_the_truth_and_of_nothing():
    from flora_lab.tasks.evaluation.dota_precision import Boxes, precisions

    truth, _ = pictures(0)
    best = [Boxes(one.quads, one.classes, np.ones(len(one.classes))) for one in truth]
    assert precisions(truth, best) == {"mAP": 1.0, "AP50": 1.0, "AP75": 1.0}
    nothing = [Boxes(np.zeros((0, 4, 2)), np.zeros(0, int), np.zeros(0))] * 3
    assert precisions(truth, nothing) == {"mAP": 0.0, "AP50": 0.0, "AP75": 0.0}


def test_an_object_that_two_tiles_see_is_found_once(data):
    job = task(data)
    image = job.source.images[0]
    numbers = [number for number, tile in enumerate(job.tiles) if tile.place == 0]
    assert len(numbers) == 2  # they share 32 columns, in which the plane is not whole
    (plane,) = dota.rectangles(np.array([PLANE], dtype=float).reshape(1, 4, 2))
    boxes = np.zeros((2, 3, 5))
    for row, number in enumerate(numbers):
        boxes[row, 0] = plane - [job.tiles[number].left, job.tiles[number].top, 0, 0, 0]
    boxes[1, 1] = boxes[1, 0]
    scores, classes = np.array([[0.9, 0, 0], [0.8, 0.7, 0]]), np.array([[1, 0, 0], [1, 2, 0]])
    (found,) = job.detections(numbers, boxes, scores, classes).values()
    assert sorted(zip(found.classes.tolist(), found.scores.tolist(), strict=True)) == [(1, 0.9), (2, 0.7)]
    corners = np.array(image.quads[1]).reshape(4, 2)
    assert {tuple(np.round(one, 6)) for one in found.quads[0]} == {tuple(one) for one in corners}


# ---------------------------------------------------------------------------------------------------------- training


def test_a_tile_shows_its_part_of_the_picture(data):
    job = task(data)
    train = job.splits(0)["train"]
    example = train[0]
    whole = (
        example["pixel_values"] * torch.tensor(job.data.std)[:, None, None] + torch.tensor(job.data.mean)[:, None, None]
    )
    for quad in dota.corners(example["boxes"].numpy())[example["classes"].numpy() > 0]:
        x, y = quad.mean(0).astype(int)
        assert torch.allclose(whole[:, y, x], torch.tensor([250, 200, 0]) / 255, atol=1e-5)
    assert example["pixel_values"].shape == (3, 48, 48) and example["boxes"].shape[1] == 5


def test_mirrored_boxes_stay_on_their_objects(data):
    job = task(data, augment=True)
    train = job.splits(0)["train"]
    torch.manual_seed(0)
    seen = set()
    for index in [*range(len(train))] * 6:
        example = train[index]
        whole = example["pixel_values"][0] * job.data.std[0] + job.data.mean[0]
        for quad in dota.corners(example["boxes"].numpy())[example["classes"].numpy() > 0]:
            x, y = quad.mean(0).astype(int)
            seen.add((x, y))
            assert whole[y, x] > 0.9
    assert len(seen) > 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning", "ignore:`torch.jit.script`:FutureWarning")
@pytest.mark.parametrize("bf16", [False, True])
def test_it_trains_and_is_judged(data, tmp_path, bf16):
    job = task(data)
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
    assert 0 <= found["eval_mAP"] <= found["eval_AP50"] <= 1
    for part in ("body.layer1", "body.layer3", "fpn", "rcnn.rpn_head", "rcnn.roi_head"):
        assert any(not torch.equal(w, before[name]) for name, w in model.named_parameters() if name.startswith(part))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert job.outputs(model.eval(), [splits["test"][0]]).requires_grad


def test_the_head_is_all_but_the_backbone_and_timms_bodies_load(data, tmp_path):
    import timm
    from safetensors.torch import save_file

    classifier = timm.create_model("test_efficientnet")
    file = tmp_path / "classifier.safetensors"
    save_file(classifier.state_dict(), file)
    keys = {"model_type": "timm_backbone", "backbone": "test_efficientnet", "out_indices": [1, 2, 3, 4]}
    job = task(data, keys)
    job.backbone.weights = str(file)
    model = job.build()
    parts = tuple(f"{name}." for name in job.head(model))
    assert {name.split(".")[0] for name, _ in model.named_parameters() if not name.startswith(parts)} == {"body"}
    own, saved = model.body.state_dict(), classifier.state_dict()
    assert all(torch.equal(tensor, saved[name.removeprefix("_backbone.")]) for name, tensor in own.items())
    assert model(**job.collate([job.splits(0)["train"][0]]))["loss"].isfinite()


def test_boxes_are_drawn_for_the_report(data, tmp_path):
    from flora_lab.analysis.fields import _samples
    from flora_lab.tasks.evaluation.oriented_pictures import COLOURS, with_boxes

    drawn = np.array(with_boxes(Image.new("RGB", (64, 48)), np.array([PLANE] * 2).reshape(2, 4, 2), [2, -1]))
    assert drawn[8, 40:52].tolist() == [[0, 0xE5, 0xFF]] * 12 and COLOURS[1] == "#00e5ff"
    job = task(data)
    row = job.judge(job.build(), job.build, job.splits(0), tmp_path / "trial")
    assert _samples(row["samples"]) and row["samples"]["prompts"] == ["P0 0,0", "P0 16,0"]
    assert {file.name for file in (tmp_path / "trial" / "boxes").iterdir()} == {
        f"P0-{left},0-{what}.png" for left in (0, 16) for what in ("found", "labelled")
    }
    assert task(data, show=0).judge(None, None, {}, tmp_path) == {}


def test_what_was_found_is_what_the_metrics_see(data):
    """Detections that are the truth give a precision of 1, through tiles and back."""
    job = task(data)
    test = job.splits(0)["test"]
    numbers, rows = [], []
    for number, _ in test.tiles:
        quads, classes = test._objects(number)
        boxes, scores, kinds = np.zeros((4, 5)), np.zeros(4), np.zeros(4, dtype=int)
        whole = classes > 0
        boxes[: whole.sum()], scores[: whole.sum()] = dota.rectangles(quads[whole]), 0.9
        kinds[: whole.sum()] = classes[whole]
        numbers.append(number)
        rows.append((boxes, scores, kinds))
    prediction = SimpleNamespace(label_ids=np.array(numbers), predictions=tuple(map(np.stack, zip(*rows, strict=True))))
    assert job.metrics(prediction)["mAP"] == pytest.approx(1.0)
