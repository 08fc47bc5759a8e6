"""Files that users bring, the same for every task: text in UTF-8, pictures upright, and kinds that are not read."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import test_task_images as images
import test_task_instance as instance
import test_task_language as language
import test_task_oriented as oriented
import test_task_semantic as semantic
import test_task_text_to_image as diffusion
import test_task_visual as visual
from PIL import ExifTags, Image

from flora_lab.tasks.data import coco, dota
from flora_lab.tasks.data.glue import SUBSETS, read_tsv
from flora_lab.tasks.data.pictures import opened, read, size_of
from flora_lab.tasks.data.rows import read_rows
from flora_lab.tasks.diffusion.captions import Captions, read_captions
from flora_lab.tasks.evaluation.forgetting import Passages
from flora_lab.tasks.glue import Glue, Sentences

# ------------------------------------------------------------------------------------------------------------- texts


def template_of(module, part):
    """Reads the template of a job of ``module``, from that part of it."""

    def read(folder):
        job = module.task(folder / "rows.jsonl")
        job.chat_template = str(folder / "template.jinja")
        return getattr(job, part).chat_template

    return read


def rows_of(file):
    return lambda folder: list(read_rows(str(folder / file), None)["train"].dataset)


def captions(folder):
    return diffusion.captions_in(Captions(path=str(folder)))


def one_picture(folder):
    diffusion.pictures(folder, 1)


def one_box(folder):
    oriented.write(folder, oriented.line(oriented.SHIP))


def one_object(folder):
    instance.write(folder, "train", instance.content(1), 1)


CHAT = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "café"}]}'
BOX = f"gsd:0.5\n{oriented.line(oriented.SHIP, 'café')}\n"
OBJECTS = json.dumps(instance.content(1), indent=1).replace('"low"', '"café"')
TEMPLATE = "{# a\n #}{{ 'café' }}\n"
TEXTS = {  # file, text, what makes the other files of the data, and what reads it
    "captions": ("0.txt", "a\ncafé\n", one_picture, captions),
    "metadata": ("metadata.jsonl", '\n{"file_name": "0.png", "text": "a\u2028café"}\n', one_picture, captions),
    "boxes": ("labelTxt/P1.txt", BOX, one_box, lambda folder: dota.read(folder, [], [], False).classes),
    "objects": ("train.json", OBJECTS, one_object, lambda folder: coco.read(folder, False).categories),
    "JSON lines": ("train.jsonl", f"\n{CHAT}\n", None, rows_of("train.jsonl")),
    "JSON": ("train.json", f"[\n{CHAT}\n]", None, rows_of("train.json")),
    "CSV": ("train.csv", 'prompt,completion\n"a\n?",café\n', None, rows_of("train.csv")),
    "sentences": (
        "train.tsv",
        "sentence\tlabel\ncafé\t1\n",
        None,
        lambda folder: read_tsv(folder / "train.tsv", SUBSETS["sst2"], False).dataset["sentence"][:],
    ),
    "a tokenizer's template": ("template.jinja", TEMPLATE, None, template_of(language, "tokenizer")),
    "a processor's template": ("template.jinja", TEMPLATE, None, template_of(visual, "processor")),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_utf8_and_another_encoding_is_named_by_file_and_line(kind, tmp_path):
    name, text, make, read = TEXTS[kind]
    if make:
        make(tmp_path)
    file = tmp_path / name
    file.write_bytes(text.encode())
    expected = read(tmp_path)
    assert "café" in str(expected)
    file.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read(tmp_path) == expected
    file.write_bytes(text.encode("latin-1", errors="replace"))
    line = text[: text.index("é")].count("\n") + 1
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert str(error.value) == f"{file}, line {line}: invalid continuation byte; expected UTF-8"


# ------------------------------------------------------------------------------------------------ what is not there

READERS = {
    "rows": lambda name: read_rows(name, None),
    "pictures": read,
    "captions": lambda name: read_captions(Captions(path=name)),
    "sentences": lambda name: Glue(data=Sentences(path=name)).splits(0),
    "texts": lambda name: Passages(name).read(None, None),
    "objects": lambda name: coco.read(Path(name), False),
    "boxes": lambda name: dota.read(Path(name), [], [], False),
}


@pytest.mark.parametrize("kind", READERS)
def test_data_that_is_not_there_is_said_to_be_no_file(kind, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\non the Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = "'data/none.json' is not a file or folder here, and the hub returned: Couldn't reach it on the Hub"
    for name in ("none.csv", "data/none.json"):
        with pytest.raises(ValueError) as error:
            READERS[kind](name)
        assert str(error.value) in (f"{name}: no such file or folder", hub)


# ---------------------------------------------------------------------------------------------------------- pictures

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
UPRIGHT = {  # by EXIF's number, which says at what side of the upright picture the stored first row and column are
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def save(file, pixels, orientation=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(file, exif=exif)
    return str(file)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("number", UPRIGHT)
def test_a_picture_is_turned_upright(number, ending, tmp_path):
    stored = np.asarray(Image.open(save(tmp_path / f"plain.{ending}", PIXELS)))
    file = save(tmp_path / f"turned.{ending}", PIXELS, number)
    shown = opened({"path": file}, "a", "image", 3)
    np.testing.assert_array_equal(np.asarray(shown), UPRIGHT[number](stored))
    assert size_of(file) == shown.size
    given = Image.open(file)  # as the hub may hand it over
    assert np.array_equal(np.asarray(opened(given, "a", "image")), np.asarray(shown))


def test_a_picture_whose_exif_is_broken_stays_as_it_is(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0broken")
    file = str(tmp_path / "a.png")
    assert np.array_equal(np.asarray(opened({"path": file}, "a", "image", 3)), PIXELS)
    assert size_of(file) == (20, 12)


def of_classes(folder, photo):
    for number in range(8):
        photo(folder / "cat" / f"{number}.png")
        photo(folder / "dog" / f"{number}.png")
    return images.job(folder, size=8)


def of_scenes(folder, photo):
    for number in range(8):
        photo(folder / "images" / f"{number}.png")
        save(folder / "annotations" / f"{number}.png", PIXELS[..., 0] % 3)
    return semantic.task(folder, classes=3)


def of_captions(folder, photo):
    for number in range(4):
        photo(folder / f"{number}.png")
    return diffusion.task(folder, data={"prompt": "a"}, config={**diffusion.SMALL, "num_class_embeds": None})


def of_conversations(folder, photo):
    visual.llava(folder)
    for name in visual.COLOURS:
        photo(folder / f"{name}.png")
    return visual.task(folder / "train.json")


def of_objects(folder, photo):
    told = instance.content(6)
    for image in told["images"]:
        image |= {"width": 20, "height": 12}
    for entry in told["annotations"]:
        entry |= {"bbox": [2, 3, 9, 8], "segmentation": [[2, 3, 11, 3, 11, 11, 2, 11]]}
    instance.write(folder, "train", told, 6)
    for number in range(6):
        photo(folder / "train" / f"{number}.png")
    return instance.task(folder, test_share=0.3, validation_share=0.3)


def of_boxes(folder, photo):
    for number in range(4):
        oriented.write(folder, oriented.line([2, 3, 18, 3, 18, 10, 2, 10]), name=f"P{number}")
        photo(folder / "images" / f"P{number}.png")
    return oriented.task(folder)


TASKS = [of_classes, of_scenes, of_captions, of_conversations, of_objects, of_boxes]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_shows_pictures_upright(task, tmp_path):
    examples = []
    for name, photo in {
        "plain": lambda file: save(file, PIXELS),
        "turned": lambda file: save(file, np.ascontiguousarray(np.rot90(PIXELS)), 6),
    }.items():
        job = task(tmp_path / name, photo)
        splits = job.splits(0)
        job.check(splits)
        examples.append(splits["train"][0])
    key = "images" if task is of_conversations else "pixel_values"
    plain, turned = (np.asarray(example[key]) for example in examples)
    np.testing.assert_array_equal(turned, plain)


def test_boxes_count_from_the_upright_picture(tmp_path):
    (image, *_) = of_boxes(tmp_path, lambda file: save(file, np.ascontiguousarray(np.rot90(PIXELS)), 6)).source.images
    assert (image.width, image.height) == (20, 12)


def test_a_coco_size_before_turning_is_named(tmp_path):
    job = of_objects(tmp_path, lambda file: save(file, PIXELS, 6))
    with pytest.raises(
        ValueError, match=r"the image is 12 × 20, not 20 × 12; pictures are turned upright, as their EXIF"
    ):
        job.check(job.splits(0))


@pytest.mark.parametrize("task", [of_classes, of_captions, of_boxes])
def test_pictures_of_a_kind_that_is_not_read_are_named(task, tmp_path):
    def read(job):
        return job.source if task is of_boxes else job.splits(0)

    job = task(tmp_path, lambda file: save(file, PIXELS))
    folder = next(tmp_path.rglob("*.png")).parent
    for name in (".hidden.heic", "notes.md"):
        (folder / name).write_bytes(b"")
    assert read(job)
    for name in ("a.HEIC", "b.cr2"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read(task(tmp_path, lambda file: None))
    assert f"{folder / 'a.HEIC'} and 1 more: .cr2, .heic is not read; save it as JPEG or PNG" in str(error.value)


@pytest.mark.parametrize("ending", ["heic", "dng"])
def test_a_single_file_of_a_kind_that_is_not_read_is_named(ending, tmp_path):
    file = tmp_path / f"a.{ending}"
    if ending == "heic":
        file.write_bytes(b"\0\0\0\x18ftypheic")
    else:  # which Pillow would open: it begins with a small TIFF
        Image.fromarray(PIXELS).save(file, "TIFF")
    with pytest.raises(
        ValueError, match=rf"a\.{ending}.* not a readable image: \.{ending} is not read; save it as JPEG"
    ):
        opened({"path": str(file)}, "row 1", "image")
