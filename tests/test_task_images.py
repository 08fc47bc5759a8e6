"""Image classification: where images come from, how they are shown, and what is wrong with them, by file and row."""

import io

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flora.tasks.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from flora.tasks.image_classification import ImageClassification, Images
from flora.tasks.pretrained import Pretrained

RESNET = Pretrained(config={"model_type": "cifar_resnet", "depth": 8})


def jpeg(seed=0, size=(12, 10)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def parquet(path, labels, names=("cat", "dog", "eel"), images=None, column="image"):
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({column: datasets.Image(), "label": label})
    pictures = [image and {"bytes": image, "path": "a.jpg"} for image in images or map(jpeg, range(len(labels)))]
    datasets.Dataset.from_dict({column: pictures, "label": labels}, features=features).to_parquet(path)


def job(path, **keys):
    return ImageClassification(model=RESNET, data=Images(path=str(path), **keys))


def digits(**keys):
    return ImageClassification(data=Images(test_share=0.3, validation_share=0.2, mean=[0.5], std=[0.5], **keys))


def test_digits_are_split_once_and_shown_as_asked():
    splits, again, other = digits().splits(0), digits().splits(0), digits().splits(1)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [899, 359, 539]
    assert all(torch.equal(splits["test"][i]["pixel_values"], again["test"][i]["pixel_values"]) for i in range(50))
    labels = [[split["test"][i]["labels"] for i in range(50)] for split in (splits, other)]
    assert labels[0] != labels[1]
    seen = [{split.table.name(i) for i in range(len(split))} for split in splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1797
    image, changed = (task.splits(0)["train"][0]["pixel_values"] for task in (digits(), digits(rotate=90, invert=True)))
    assert image.shape == (1, 8, 8) and torch.allclose(changed, -torch.rot90(image, 1, (1, 2)), atol=1e-6)


def test_classes_are_numbered_from_nought():
    split = digits(classes=[7, 3]).splits(0)["train"]
    rows = [split.table[i]["label"] for i in range(len(split))]
    assert set(rows) == {3, 7} and [split[i]["labels"] for i in range(20)] == [[7, 3].index(r) for r in rows[:20]]


def test_parquet_files_and_folders_of_images(tmp_path):
    parquet(tmp_path / "train-0.parquet", [0, 1, 2] * 4)
    parquet(tmp_path / "train-1.parquet", [2, 1, 0] * 4)
    parquet(tmp_path / "test.parquet", [0, 1, 2])
    task = job(tmp_path, size=8, augment=True, train_examples=15)
    splits = task.splits(0)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [15, 2, 3]
    assert splits["test"].table.name(1) == f"{tmp_path / 'test.parquet'}, row 1"
    batch = task.collate([splits["train"][i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    task.build()(**batch).loss.backward()

    folder = tmp_path / "folder"
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{i}.jpg").write_bytes(jpeg(i))
    splits = job(folder, test_examples=3).splits(0)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [11, 1, 3]
    assert splits["train"][0]["pixel_values"].shape == (3, 10, 12)


def broken(tmp_path, how):
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    parquet(train, [0, 1, 2] * 4)
    parquet(test, [0, 1, 2])
    if how == "column":
        parquet(test, [0, 1, 2], column="picture")
    elif how == "empty":
        parquet(test, [], images=[])
    elif how == "label":
        parquet(train, [0, 1, -5, 2], names=())
    elif how == "classes":
        parquet(train, [0, 1] * 5)
    elif how == "jpeg":
        parquet(test, [0, 1, 2], images=[jpeg(), jpeg()[:200], jpeg()])
    elif how == "missing":
        parquet(test, [0, 1, 2], images=[jpeg(), None, jpeg()])
    elif how == "parquet":
        test.write_bytes(test.read_bytes()[:-40])
    elif how == "no train":
        train.unlink()
        parquet(tmp_path / "validation.parquet", [0, 1])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("column", "test.parquet has no column 'image', but picture, label"),
        ("empty", "test.parquet is empty"),
        ("label", "train.parquet, row 2: label=-5; expected 0 to 2"),
        ("classes", "test.parquet, row 2: class 2 is not in the train split"),
        ("jpeg", "test.parquet, row 1 (a.jpg): column 'image' is no readable image"),
        ("missing", "test.parquet, row 1: column 'image' is no readable image"),
        ("parquet", "test.parquet"),
        ("no train", "has no train split, but test, validation"),
    ],
)
def test_bad_data_is_named_before_training(how, named, tmp_path):
    broken(tmp_path, how)
    task = job(tmp_path)
    with pytest.raises(ValueError) as error:
        task.check(task.splits(0))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such file or folder"):
        job(tmp_path / "nothing").splits(0)


def test_cifar_resnet_is_the_one_of_the_paper():
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=56, num_labels=10))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.85  # M, Table 6 of He et al.
    assert len([m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]) == 55
    block, x = model.layer2[0].double().eval(), torch.randn(2, 16, 8, 8, dtype=torch.float64)
    block.bn2.weight.data.zero_()
    shortcut = torch.zeros(2, 32, 4, 4, dtype=torch.float64)
    shortcut[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), F.relu(shortcut))


def test_weights_of_a_file_all_but_the_heads(tmp_path):
    from safetensors.torch import load_file, save_file

    model, file = RESNET.load("AutoModelForImageClassification", ("linear",), num_labels=10), tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    keys = Pretrained(config=RESNET.config, weights=str(file))
    again = keys.load("AutoModelForImageClassification", ("linear",), num_labels=3)
    assert torch.equal(again.conv1.weight, model.conv1.weight) and again.linear.weight.shape == (3, 64)
    tensors = load_file(file)
    for change, named in (
        ({"conv1.weight": torch.zeros(3, 3)}, r"'conv1.weight' is \[3, 3\], the model's is \[16, 3, 3, 3\]"),
        ({"conv9.weight": torch.zeros(1)}, "'conv9.weight' is in only one of the file"),
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises(ValueError, match=named):
            keys.load("AutoModelForImageClassification", ("linear",), num_labels=3)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, "a model is given by name or config"),
        ({"config": {"depth": 8}}, "expected a model_type"),
        ({"name": "a/b", "weights": "w.safetensors"}, "brings its own"),
        ({"config": {"model_type": "cifar_resnet", "depth": 9}}, "depth=9: expected 6 n"),
        ({"config": {"model_type": "cifar_vgg"}}, "cifar_vgg"),
    ],
)
def test_a_bad_model_is_named(keys, named):
    with pytest.raises(ValueError) as error:
        Pretrained(**keys).load("AutoModelForImageClassification", ("linear",))
    assert named in str(error.value)


def test_timm_models_have_their_head_trained():
    sizes = {"architecture": "convnextv2_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
    task = ImageClassification(model=Pretrained(config={"model_type": "timm_wrapper", **sizes}))
    model = task.build()
    assert task.head(model) == ["timm_model.head.fc"] and model.get_submodule("timm_model.head.fc").out_features == 10
