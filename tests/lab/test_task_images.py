"""Image classification: where images come from, how they are shown, and what is wrong with them, by file and row."""

import inspect
import io
import math

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import EvalPrediction

from flora_lab.tasks.data.pictures import open_image
from flora_lab.tasks.data.records import Records
from flora_lab.tasks.image_classification import ImageClassification, Images
from flora_lab.tasks.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from flora_lab.tasks.models.pretrained import Pretrained

RESNET = Pretrained(config={"model_type": "cifar_resnet", "depth": 8})


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def jpeg(seed=0, size=(12, 10)):
    return encoded(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8), "JPEG")


def parquet(path, labels, names=("cat", "dog", "eel"), images=None, column="image"):
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({column: datasets.Image(), "label": label})
    pictures = [
        None if image is None else {"bytes": image, "path": "a.jpg"}
        for image in images or map(jpeg, range(len(labels)))
    ]
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
    seen = [{split.records.name(i) for i in range(len(split))} for split in splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1797
    image, changed = (task.splits(0)["train"][0]["pixel_values"] for task in (digits(), digits(rotate=90, invert=True)))
    assert image.shape == (1, 8, 8) and torch.allclose(changed, -torch.rot90(image, 1, (1, 2)), atol=1e-6)


def test_classes_are_numbered_from_nought():
    split = digits(classes=[7, 3]).splits(0)["train"]
    rows = [split.records[i]["label"] for i in range(len(split))]
    assert set(rows) == {3, 7} and [split[i]["labels"] for i in range(20)] == [[7, 3].index(r) for r in rows[:20]]


def test_parquet_files_and_folders_of_images(tmp_path):
    parquet(tmp_path / "train-0.parquet", [0, 1, 2] * 4)
    parquet(tmp_path / "train-1.parquet", [2, 1, 0] * 4)
    parquet(tmp_path / "test.parquet", [0, 1, 2])
    task = job(tmp_path, size=8, augment=True, train_examples=15)
    splits = task.splits(0)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [15, 2, 3]
    assert splits["test"].records.name(1) == f"{tmp_path / 'test.parquet'}, row 1"
    batch = task.collate([splits["train"][i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    task.build()(**batch).loss.backward()


def fill(folder, names):
    """A picture at each of some paths below it."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed))


def test_folders_of_images(tmp_path):
    counts = {"train": 6, "Val": 2}
    fill(tmp_path, [f"{split}/{c}/{i}.jpg" for split in counts for c in ("cat", "dog") for i in range(counts[split])])
    splits = job(tmp_path, test_examples=3).splits(0)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [11, 1, 3]
    assert splits["train"][0]["pixel_values"].shape == (3, 10, 12)


def test_what_a_picture_is_called_tells_nothing(tmp_path):
    names = [f"{c}/{name}.JPG" for c in ("a-1", "a") for name in ("train-0", "eye_test", "dev", "[x] 犬", *range(6))]
    fill(tmp_path, [*names, "a/Thumbs.db", "a/.hidden.jpg"])
    splits = job(tmp_path).splits(0)
    tables = [split.records for split in splits.values()]
    found = {table[i]["image"]["path"]: table[i]["label"] for table in tables for i in range(len(table))}
    assert found == {str(tmp_path / name): int(name.startswith("a-1")) for name in names}
    table = job(tmp_path)._records["train"]
    assert [table.name(i) for i in range(20)] == sorted(str(tmp_path / name) for name in names)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "test/.keep"], "the test split is empty"),
        (["a/0.jpg", "b/more/0.jpg"], "b/more/0.jpg is not where a picture is expected, CLASS/NAME"),
        (["a/0.jpg", "0.jpg"], "0.jpg is not where a picture is expected, CLASS/NAME"),
        (["train/0.jpg"], "train/0.jpg is not where a picture is expected, SPLIT/CLASS/NAME, with SPLIT one of train"),
        (["train/a/0.jpg", "more/a/0.jpg"], "more/a/0.jpg is not where a picture is expected, SPLIT/CLASS/NAME"),
        (["a/0.jpg", "a/1.jpg"], "has one class only"),
        (["train/a/0.jpg", "val/a/0.jpg", "Valid/a/0.jpg"], "both Valid and val are a validation split"),
        (["val/a/0.jpg", "val/b/0.jpg"], "has no train split, but validation"),
        (["readme.txt"], "no pictures and no parquet files in it"),
    ],
)
def test_a_folder_that_is_none_of_images_is_named(names, named, tmp_path):
    fill(tmp_path, names)
    with pytest.raises(ValueError) as error:
        job(tmp_path).splits(0)
    assert str(error.value).startswith(str(tmp_path)) and named in str(error.value)


def test_a_link_to_nowhere_is_named(tmp_path):
    fill(tmp_path, [f"{c}/{i}.jpg" for c in "ab" for i in range(9)])
    (tmp_path / "a" / "9.jpg").symlink_to("nowhere.jpg")
    task = job(tmp_path)
    with pytest.raises(ValueError, match=r"a.9\.jpg: column 'image' is not a readable image: missing$"):
        task.check(task.splits(0))


@pytest.mark.parametrize(
    ("files", "lengths"),
    [
        ({"[1]/train.parquet": [0, 1, 2] * 10, "[1]/test.parquet": [0, 1]}, [27, 3, 2]),
        ({"default/train/0000.parquet": [0, 1, 2] * 10, "default/test/0000.parquet": [0, 1]}, [27, 3, 2]),
        ({"train.parquet": [0, 1, 2] * 10, "dev.parquet": [0, 1], "test.parquet": [-1] * 9}, [27, 3, 2]),
        ({"train.parquet": [0, 1, 2] * 10, "dev.parquet": [0, 1], "test.parquet": [None] * 9}, [27, 3, 2]),
    ],
)
def test_what_is_taken_for_a_split(files, lengths, tmp_path):
    for name, labels in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / name, labels)
    assert [len(split) for split in job(tmp_path).splits(0).values()] == lengths


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
    elif how == "parquet":
        test.write_bytes(test.read_bytes()[:-40])
    elif how == "no train":
        train.unlink()
        parquet(tmp_path / "validation.parquet", [0, 1])
    elif how == "two":
        parquet(tmp_path / "val.parquet", [0, 1, 2])
        parquet(tmp_path / "dev.parquet", [0, 1, 2])
    elif how in NAMES:
        parquet(test, [0, 1], names=NAMES[how])
    elif how in IMAGES:
        parquet(test, [0, 1, 2], images=[jpeg(), IMAGES[how], jpeg()])


NAMES = {"order": ("cat", "eel", "dog"), "fewer": ("cat", "dog")}
IMAGES = {
    "jpeg": jpeg()[:200],
    "missing": None,
    "empty file": b"",
    "text": b"hello",
    "size": jpeg(size=(10, 12)),
    "long": encoded(np.ones((10, 12), dtype="int32"), "TIFF"),
    "float": encoded(np.ones((10, 12), dtype="float32"), "TIFF"),
}


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("column", "test.parquet has no column 'image', but picture, label"),
        ("empty", "test.parquet is empty"),
        ("label", "train.parquet, row 2: label=-5; expected 0 to 2"),
        ("classes", "test.parquet, row 2: class 'eel' is not in the train split"),
        ("order", "train.parquet: class 1 is 'dog', but 'eel' in "),
        ("fewer", "train.parquet: class 2 is 'eel', but None in "),
        ("two", "both dev and val are a validation split"),
        ("jpeg", "test.parquet, row 1 (a.jpg): column 'image' is not a readable image"),
        ("missing", "test.parquet, row 1: column 'image' is not a readable image: missing"),
        ("empty file", "row 1 (a.jpg): column 'image' is not a readable image: not a picture"),
        ("text", "row 1 (a.jpg): column 'image' is not a readable image: not a picture"),
        ("size", "test.parquet, row 1 is 10 × 12, and "),
        ("long", "row 1 (a.jpg): column 'image' is not a readable image: of mode I, whose range is unknown"),
        ("float", "row 1 (a.jpg): column 'image' is not a readable image: of mode F, whose range is unknown"),
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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_greys_of_16_bits_are_scaled_to_8(kind, channels):
    grey = np.arange(256).reshape(16, 16)
    deep, flat = encoded((257 * grey).astype("uint16"), kind), encoded(grey.astype("uint8"))
    table = Records(datasets.Dataset.from_dict({"image": [{"bytes": one, "path": None} for one in (deep, flat)]}), str)
    opened = [np.asarray(open_image(table, row, "image", channels)) for row in range(2)]
    assert opened[0].shape == (16, 16, 3)[: 1 + channels] and np.array_equal(*opened)


@pytest.mark.parametrize(
    "keys", [{"mean": [math.nan, 0, 0]}, {"std": [math.inf, 1, 1]}, {"std": [math.nan, 1, 1]}, {"std": [0, 1, 1]}]
)
def test_pictures_are_normalised_by_numbers(keys):
    with pytest.raises(ValueError, match="expected one or three numbers each, the latter above 0"):
        Images(**keys)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_classifier_that_diverged_has_no_accuracy(value):
    scores, labels = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1])
    assert digits().metrics(EvalPrediction(scores, labels)) == {"accuracy": 0.5}
    scores[1, 0] = value
    assert math.isnan(digits().metrics(EvalPrediction(scores, labels))["accuracy"])


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
        ({"name": "a/b", "weights": "w.safetensors"}, "has its own"),
        ({"config": {"model_type": "cifar_resnet", "depth": 9}}, "depth=9: expected 6 n"),
        ({"config": {"model_type": "cifar_vgg"}}, "cifar_vgg"),
    ],
)
def test_a_bad_model_is_named(keys, named):
    with pytest.raises(ValueError) as error:
        Pretrained(**keys).load("AutoModelForImageClassification", ("linear",))
    assert named in str(error.value)


def test_timm_models_have_a_new_head_and_it_is_trained(tmp_path):
    sizes = {"architecture": "convnextv2_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
    task = ImageClassification(model=Pretrained(config={"model_type": "timm_wrapper", **sizes}))
    model = task.build()
    assert task.head(model) == ["timm_model.head.fc"] and model.get_submodule("timm_model.head.fc").out_features == 10
    model.save_pretrained(tmp_path)
    named = ImageClassification(model=Pretrained(name=str(tmp_path))).build()
    differing = {n for n, tensor in named.state_dict().items() if not torch.equal(tensor, model.state_dict()[n])}
    assert differing == {"timm_model.head.fc.weight", "timm_model.head.fc.bias"}


def test_weights_of_a_file_in_timm_s_names(tmp_path):
    from safetensors.torch import save_file

    config = {"model_type": "timm_wrapper", "architecture": "convnextv2_atto", "model_args": {"dims": [8] * 4}}
    model, file = ImageClassification(model=Pretrained(config=config)).build(), tmp_path / "w.safetensors"
    body = {n: t.half() for n, t in model.timm_model.state_dict().items() if not n.startswith("head.fc")}
    save_file(body, file)
    again = ImageClassification(model=Pretrained(config=config, weights=str(file))).build().timm_model.state_dict()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in body.items())


SMALL = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"], **SMALL}, ["classifier"]),
        ({"model_type": "swiftformer", "depths": [1] * 4, "embed_dims": [8] * 4}, ["head", "dist_head"]),
        ({"model_type": "textnet", "hidden_sizes": [8] * 5, "stem_out_channels": 8}, ["fc"]),
    ],
)
def test_every_output_layer_is_trained(config, head):
    task = ImageClassification(model=Pretrained(config=config))
    model = task.build()
    assert task.head(model) == head and "labels" in inspect.signature(model.forward).parameters


def test_a_model_without_a_known_output_layer_is_named():
    with pytest.raises(ValueError, match="Sequential has no output layer named classifier, score"):
        digits().head(torch.nn.Sequential())
