"""Files that users bring, the same for every task: text in UTF-8, pictures upright, and kinds that are not read."""

import json

import pytest
import test_task_instance as instance
import test_task_language as language
import test_task_oriented as oriented
import test_task_text_to_image as diffusion
import test_task_visual as visual

from flora_lab.tasks.data import coco, dota
from flora_lab.tasks.data.chats import read_rows
from flora_lab.tasks.data.glue import SUBSETS, read_tsv
from flora_lab.tasks.diffusion.captions import Captions

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
