"""Classes of a user's own texts: what is read of the files, what is refused, and how it is judged."""

import csv
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from test_task_glue import tiny_model

from commands import flora
from flora_lab.tasks.models.pretrained import Pretrained
from flora_lab.tasks.text_classification import LabelledTexts, TextClassification

ROWS = [
    {"text": "cats chase", "second": "dogs sleep", "label": label} for label in ("play", "rest", "rest", "hunt")
] * 6


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    if name.endswith("jsonl"):
        content = "\n".join(map(json.dumps, rows))
        (folder / name).write_text(content, encoding="utf-8-sig")
    elif name.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(folder / name)
    else:
        with (folder / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            table.writeheader()
            table.writerows(rows)
    return folder


def task_of(folder, rows=ROWS, name="train.jsonl", **keys):
    data = LabelledTexts(path=str(write(folder / "data", rows, name)), **keys)
    model = folder / "model"
    return TextClassification(model=Pretrained(name=str(model if model.exists() else tiny_model(model))), data=data)


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.tsv", "train.parquet"])
def test_texts_and_classes_are_read(name, tmp_path):
    task = task_of(tmp_path, name=name, pair="second")
    splits = task.splits(0)
    assert {split: len(records) for split, records in splits.items()} == {"train": 17, "validation": 2, "test": 5}
    assert task.classes == ["hunt", "play", "rest"]
    for records in splits.values():
        for index in range(len(records)):
            number = int(records.name(index).rsplit(maxsplit=1)[1]) - {"jsonl": 1, "parquet": 0}.get(name[6:], 2)
            example = records[index]
            assert task.tokenizer.decode(example["input_ids"]) == "[CLS] cats chase [SEP] dogs sleep [SEP]"
            assert task.classes[example["labels"]] == ROWS[number]["label"]
    assert task.build().config.id2label == {0: "hunt", 1: "play", 2: "rest"}


def test_a_field_in_quotes_may_have_separators_and_lines(tmp_path):
    rows = [{"text": 'cats, "dogs"\nchase', "label": "a,b"}, {"text": "dogs", "label": "c"}] * 12
    task = task_of(tmp_path, rows, "train.csv")
    assert task.classes == ["a,b", "c"] and len(task.splits(0)["train"]) == 17


def test_numbers_keep_their_order_and_a_test_split_without_labels_is_left_out(tmp_path):
    write(tmp_path / "data", [{"text": "cats", "label": -1}], "test.jsonl")
    task = task_of(tmp_path, [{"text": "cats", "label": label} for label in (10, 9, 2)] * 8)
    assert task.classes == ["2", "9", "10"] and len(task.splits(0)["test"]) == 5


def test_the_names_of_classes_come_from_the_hub(tmp_path, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["cats"] * 20, "label": [0, 1] * 10}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset: {"train": rows})
    task = TextClassification(
        model=Pretrained(name=str(tiny_model(tmp_path / "model"))), data=LabelledTexts(path="owner/name")
    )
    assert task.classes == ["no", "yes"] and len(task.splits(0)["train"]) == 14


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "cats"}, "line 25 has no column 'label', but text"),
        ({"texts": "cats", "label": "rest"}, "line 25 has no column 'text', but texts, label"),
        ({"text": 5, "label": "rest"}, "line 25: column 'text' is int, not text"),
        ({"text": " ", "label": "rest"}, "line 25: no text"),
        ({"text": "cats", "label": 0.5}, "line 25: label=0.5; expected the name of a class, or a whole number"),
        ({"text": "cats", "label": ""}, "line 25: label=''; expected the name of a class"),
        (["cats"], r"line 25: \['cats'\] is not an object of columns"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"train\.jsonl, {message}"):
        task_of(tmp_path, [*ROWS, row]).splits(0)


def test_a_row_of_the_test_split_that_has_no_columns_is_named(tmp_path):
    write(tmp_path / "data", [["cats"]], "test.jsonl")
    with pytest.raises(ValueError, match=r"test\.jsonl, row 0: 'cats' is not an object of columns"):
        task_of(tmp_path).splits(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\ncats,a\ncats,a,b\n", r"train\.csv, line 3: 3 fields, expected 2: text, label"),
        ('text,label\n"cats"x,a\n', r"train\.csv, line 2: "),
        ("text,label\ncats,a\ncats,a\n", r"^[^:,]*data has the class a only; expected two or more"),
        ("text,label\n", "is empty"),
    ],
)
def test_a_bad_table_is_named(text, message, tmp_path):
    task = task_of(tmp_path, name="train.csv")
    (tmp_path / "data" / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        task.splits(0)


def test_a_class_that_train_lacks_is_named(tmp_path):
    write(tmp_path / "data", [{"text": "cats", "label": "sing"}], "test.jsonl")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: class 'sing' is not in the train split"):
        task_of(tmp_path).splits(0)


def test_accuracy_and_f1_over_classes(tmp_path):
    scores = np.eye(3)[[0, 1, 2, 2]]
    found = task_of(tmp_path).metrics(SimpleNamespace(predictions=scores, label_ids=np.array([0, 1, 2, 1])))
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)}


def test_a_job_on_own_texts_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts", ROWS, "train.csv")
    assert flora("init", "text_classification").exit_code == 0
    keys = [f"task.model.name={tiny_model(tmp_path / 'model')}", "budget=600", "training.max_steps=2"]
    found = flora("train", "text_classification.yaml", *keys, "training.mixed_precision=no", "training.warmup_steps=1")
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in (tmp_path / "runs/text_classification/results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["full", "head", "lora", "flora"]
    assert all(0 <= row["test"][name] <= 1 for row in rows for name in ("accuracy", "macro_f1"))
