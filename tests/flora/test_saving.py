"""Saving over an adapter: whenever the process is killed, the folder holds the old adapter or the new one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from flora import FloraConfig
from flora.convert.adapter import Adapter
from flora.files import PENDING, WEIGHTS


def net(name: str) -> PeftModel:
    """One of two adapters of the same base: other layers, other ranks, another scale."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    if name == "old":
        return get_peft_model(base, FloraConfig(r=2, target_modules=["0"], init_weights=False))
    return get_peft_model(base, FloraConfig(r=3, target_modules=["0", "1"], scale=2.0, init_weights=False))


X = torch.arange(8.0).view(2, 4)


def which(folder: Path) -> str:
    """The adapter in the folder, by what it computes."""
    found = PeftModel.from_pretrained(net("old").unload(), str(folder))(X)
    (name,) = [name for name in ("old", "new") if torch.allclose(net(name)(X), found)]
    return name


def test_a_process_killed_at_any_step_leaves_the_old_adapter_or_the_new(tmp_path, monkeypatch):
    saved, killed = tmp_path / "saved", []
    net("old").save_pretrained(str(saved))
    (saved / "optimizer.pt").touch()
    adapter = net("new")

    def watched(function):
        def call(*args, **kwargs):  # what a process that is killed now leaves
            killed.append(shutil.copytree(saved, tmp_path / str(len(killed))))
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, watched(getattr(os, name)))
        adapter.save_pretrained(str(saved))
    found = [which(folder) for folder in killed]
    assert found[0] == "old" and found[-1] == "new" and sorted(found, reverse=True) == found
    for folder, name in zip(killed, found, strict=True):
        assert {site.module for site in Adapter.open(folder).sites} == ({"0"} if name == "old" else {"0", "1"})
        assert (folder / "optimizer.pt").exists()
        adapter.save_pretrained(str(folder))
        assert which(folder) == "new" and not (folder / PENDING).exists()


def test_saving_leaves_other_files_and_replaces_those_of_the_other_format(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    net("old").save_pretrained(str(tmp_path), safe_serialization=False)
    assert which(tmp_path) == "old" and not (tmp_path / WEIGHTS).exists()
    net("new").save_pretrained(str(tmp_path))
    assert which(tmp_path) == "new"
    net("old").save_pretrained(str(tmp_path), safe_serialization=False)
    assert which(tmp_path) == "old"
    assert "Mine." in (tmp_path / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]


def test_several_adapters_and_other_methods_are_saved_as_by_peft(tmp_path, monkeypatch):
    model = net("old")
    model.add_adapter("second", FloraConfig(r=1, target_modules=["1"], init_weights=False))
    model.save_pretrained(str(tmp_path / "both"), selected_adapters=["default", "second"])
    assert which(tmp_path / "both") == "old" and (tmp_path / "both" / "second" / WEIGHTS).is_file()
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("second", selected_adapters=["second"])
    assert [path.name for path in Path("second").iterdir() if path.is_dir()] == ["second"]
    lora = get_peft_model(nn.Sequential(nn.Linear(4, 5)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained("lora")
    assert sorted(os.listdir("lora")) == sorted(os.listdir(tmp_path / "lora"))
    model.save_pretrained("rank1", is_main_process=False)
    assert not list(Path("rank1").rglob("*.safetensors"))


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    net("old").save_pretrained(str(tmp_path))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        net("new").save_pretrained(str(tmp_path))
    assert which(tmp_path) == "old" and not list(tmp_path.glob(".*"))


def test_a_config_edited_by_hand_stays(tmp_path):
    net("old").save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"revision": null', '"revision": "v2"'))
    assert FloraConfig.from_pretrained(str(tmp_path)).revision == "v2"
