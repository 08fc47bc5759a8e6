"""Paths and names on the hub, files that are whole or not there, and an adapter's shapes from a folder or the hub."""

from __future__ import annotations

import errno
import functools
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from flora import FloraConfig, files
from flora.files import WEIGHTS, local_path, new_file, new_folder, open_tensors, replace_file, save_tensors
from reference import layers


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, which is the home folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "file.bin").touch()
    return tmp_path


@pytest.mark.parametrize("source", ["models", "models/one", "./models/one", "file.bin", Path("models/one")])
def test_what_exists_is_a_path(here, source):
    assert local_path(source) == Path(source)


def test_a_tilde_is_the_home_folder(here):
    assert local_path("~/models") == local_path(Path("~/models")) == here / "models"
    with new_folder("~/new/folder") as folder:
        (folder / "x").touch()
    with new_file("~/new/file") as file:
        file.touch()
    assert (here / "new" / "folder" / "x").is_file() and (here / "new" / "file").is_file()


PATHS = [
    "./none",
    "../none",
    "/none",
    "~/none",
    ".none",
    "a/b/c",
    "models/none",
    "none.csv",
    "none.JSON",
    Path("none"),
    Path("someone/none"),
]


@pytest.mark.parametrize("source", PATHS, ids=map(repr, PATHS))
def test_what_looks_like_a_path_must_exist(here, source):
    with pytest.raises(ValueError, match=f"^{source}: no such file or folder$"):
        local_path(source)


@pytest.mark.parametrize("source", ["none", "none-v1.1", "someone/model", "some.one/model-2_x", "someone/none.json"])
def test_all_else_is_a_name_on_the_hub(here, source):
    assert local_path(source) is None


# -------------------------------------------------------------------------------------------------------------- tensors


def test_a_full_disk_is_no_damaged_input(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as raised, open_tensors(tmp_path / "x"):
        raise full
    assert raised.value is full


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none/x could not be written: .*No such file"):
        save_tensors(tmp_path / "none" / "x", {"x": torch.ones(1)})


def test_new_files_and_folders_replace_nothing(tmp_path):
    with replace_file(tmp_path / "x") as file:
        file.write_text("first")
    for new in new_file, new_folder:
        with pytest.raises(FileExistsError, match="x exists already"), new(tmp_path / "x"):
            pass
    assert (tmp_path / "x").read_text() == "first"


@pytest.mark.parametrize("new", [replace_file, new_file, new_folder])
def test_what_fails_leaves_nothing_and_takes_nobodys_file(new, tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), new(tmp_path / "a" / "b" / "x"):
        (tmp_path / "a" / "theirs").touch()
        raise KeyboardInterrupt
    with pytest.raises(ValueError), new(tmp_path / "old" / "c" / "x"):
        raise ValueError
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "a/theirs", "old"]


@pytest.mark.parametrize("new", [replace_file, new_file, new_folder])
def test_leftovers_of_a_killed_process_are_in_nobodys_way(new, tmp_path):
    with pytest.raises(ValueError), new(tmp_path / "x") as temporary:
        left = temporary
        raise ValueError
    left.mkdir()  # as a process with the same number would have left it
    with new(tmp_path / "x") as temporary:
        if new is not new_folder:
            temporary.touch()
    assert (tmp_path / "x").exists() and left.is_dir()


# -------------------------------------------------------------------------------------------------------------- the hub


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(6, 5))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the adapter "someone/flora" in its subfolder "best": the folder, and the requests."""
    model = get_peft_model(net(), FloraConfig(r=2, target_modules=["0", "2"], init_weights=False))
    model.save_pretrained(str(tmp_path / "best"))
    requests = []

    @functools.wraps(huggingface_hub.hf_hub_download)
    def download(repo_id, filename, *, subfolder=None, **options):
        requests.append((filename, subfolder, options))
        path = tmp_path / (subfolder or "") / filename
        if repo_id != "someone/flora" or not path.is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"{repo_id}: no {filename}")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", download)
    monkeypatch.setattr(
        "peft.utils.save_and_load.file_exists", lambda repo_id, filename, **_: (tmp_path / filename).is_file()
    )
    return tmp_path / "best", requests


def test_the_file_on_the_hub_decides_the_ranks(hub):
    folder, requests = hub
    config = FloraConfig.from_pretrained(str(folder))
    config.r = 3
    config.save_pretrained(str(folder))
    options = {"subfolder": "best", "revision": "v2", "token": "x"}
    model = PeftModel.from_pretrained(net(), "someone/flora", **options)
    assert {layer.tucker_space["default"].ranks for layer in layers(model)} == {(2, 2, 2, 2), (2, 2)}
    own = next(request for request in requests if request[0] == WEIGHTS)
    assert own[1] == "best" and own[2]["revision"] == "v2" and own[2]["token"] == "x"


def test_a_broken_adapter_on_the_hub_is_refused_before_wrapping(hub):
    folder, _ = hub
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    model = net()
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        PeftModel.from_pretrained(model, "someone/flora", subfolder="best")
    assert not layers(model) and not hasattr(model, "peft_config")


def test_without_an_answer_of_the_hub_peft_decides(hub):
    folder, _ = hub
    (folder / WEIGHTS).unlink()
    assert files.saved_shapes("someone/flora", "best") is None
    assert FloraConfig.from_pretrained("someone/flora", subfolder="best").saved_shapes is None
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'someone/other'"):
        FloraConfig.from_pretrained("someone/other")


def test_a_folder_is_never_looked_up_on_the_hub(hub):
    folder, requests = hub
    shutil.copy(folder / "adapter_config.json", folder.parent)
    assert FloraConfig.from_pretrained(str(folder.parent)).saved_shapes is None
    assert not requests
