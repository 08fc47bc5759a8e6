"""The conversion commands, each on a tiny model in a folder: what they print, and that a mistake is exit code 2."""

from __future__ import annotations

import resource
import shutil

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from flora import FloraConfig
from flora.cli import main
from flora.convert import export_locon, export_lora
from reference import layers

TARGETS = ["query", "value", "dense"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base, tuned (the adapter merged in) and adapter, of a BERT; and the adapter in the formats that are imported."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("convert")
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=0
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(path / "base")
    adapted = get_peft_model(model, FloraConfig(r=3, target_modules=TARGETS, init_weights=False))
    adapted.save_pretrained(str(path / "adapter"))
    save_file(authors(adapted), path / "authors.safetensors")
    export_lora(path / "adapter", path / "a_lora")
    export_locon(path / "adapter", path / "a_locon.safetensors")
    adapted.merge_and_unload().save_pretrained(path / "tuned")
    return path


def authors(model) -> dict[str, torch.Tensor]:
    """The adapter as the authors' code would have saved it: in before out, the whole head beside it."""
    head = model.base_model.model.classifier.state_dict()
    tensors = {f"model.classifier.{key}": tensor for key, tensor in head.items()}
    for layer in layers(model):
        space, stem = layer.tucker_space["default"], f"model.{layer.name}.flora_layer.param_"
        tensors |= {f"{stem}G": space.core.T, f"{stem}0": space.factor_1, f"{stem}1": space.factor_0}
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def flora(folder, line: str):
    """A command line, in which names of the folder's things stand for their paths."""
    first = ("OUT", "adapter", "authors.safetensors", "base", "a_lora", "a_locon.safetensors", "tuned")
    return CliRunner().invoke(
        main, [str(folder / word) if word.partition("/")[0] in first else word for word in line.split()]
    )


# (command, what it writes, the largest difference that --verify may print)
COMMANDS = {
    "lora": ("export lora adapter OUT/lora --verify base", "lora/adapter_model.safetensors", 1e-5),
    "lora_ragged": ("export lora adapter OUT/ragged --ragged --verify base", "ragged/adapter_config.json", 1e-5),
    "locon": ("export locon adapter OUT/locon.safetensors --verify base", "locon.safetensors", 1e-5),
    "folded": ("export locon adapter OUT/folded.safetensors --folded --verify base", "folded.safetensors", 1e-5),
    "back": ("import lora a_lora OUT/back --verify base", "back/adapter_config.json", 1e-5),
    "back_based": ("import lora a_lora OUT/based --base base --verify base", "based/adapter_config.json", 1e-5),
    "back_locon": ("import locon a_locon.safetensors base OUT/back2 --verify", "back2/adapter_config.json", 1e-5),
    "back_official": (
        "import official authors.safetensors OUT/back3 --scale 0.4 --save classifier --verify base",
        "back3/adapter_config.json",
        1e-5,
    ),
    "merge": ("merge base adapter OUT/merged --verify base", "merged/model.safetensors", 1e-5),
    "extract": ("extract base tuned OUT/extracted --rank 3 --verify base", "extracted/spectra.png", 1e-4),
    "extract_budget": ("extract base tuned OUT/small --budget 0.02", "small/extraction.json", None),
    "compress": ("compress adapter OUT/compressed --energy 0.9 --verify base", "compressed/adapter_config.json", 1.0),
}


@pytest.mark.parametrize("command, written, close", COMMANDS.values(), ids=COMMANDS)
def test_a_command_says_what_it_wrote_and_verifies_it(folder, command, written, close):
    result = flora(folder, command)
    assert result.exit_code == 0, result.output
    assert (folder / "OUT" / written).is_file()
    if close is not None:
        said = next(line for line in result.stdout.splitlines() if line.startswith("verified"))
        assert float(said.partition("at most ")[2].split()[0]) < close


def test_a_tilde_is_the_home_folder_in_every_path(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for command in (
        "export lora ~/adapter ~/home/lora --verify ~/base",
        "import lora ~/home/lora ~/home/back",
        "export locon ~/adapter ~/home/locon.safetensors",
        "import locon ~/home/locon.safetensors ~/base ~/home/back2 --verify",
        "import official ~/authors.safetensors ~/home/back3 --scale 0.4",
        "merge ~/base ~/adapter ~/home/merged",
        "merge ~/base ~/adapter ~/home/merged.safetensors",
        "extract ~/base ~/tuned ~/home/extracted --rank 3 --verify ~/base",
        "compress ~/adapter ~/home/compressed --rank 1",
        "plan ~/base r=2",
    ):
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 0, result.output
    assert len(list((folder / "home").iterdir())) == 9


MISTAKES = {
    "no_folder": ("export lora nowhere OUT/x", "nowhere"),
    "no_adapter": ("export lora base OUT/x", "base has no adapter in it: there is no adapter_config.json"),
    "no_adapter_to_merge": ("merge base base OUT/x", "base has no adapter in it: there is no adapter_config.json"),
    "no_adapter_to_show": ("show base", "base has no adapter in it: there is no adapter_config.json"),
    "no_adapter_to_import": ("import lora base OUT/x", "base has no adapter in it: there is no adapter_config.json"),
    "a_file": ("export lora adapter/adapter_model.safetensors OUT/x", "is a file; an adapter's folder is needed"),
    "no_model": ("export lora adapter OUT/y --verify ./nowhere", "no such file or folder"),
    "two_sizes": ("compress adapter OUT/x --rank 2 --energy 0.5", "energy"),
    "no_number": ("compress adapter OUT/x --budget many", "--budget many"),
    "exists": ("export lora adapter base", "exists already"),
    "not_a_pipeline": ("export diffusers adapter OUT/x", "component"),
    "base_is_adapter": ("merge adapter adapter OUT/x", "adapter"),
}


@pytest.mark.parametrize("command, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_itself_and_writes_nothing(folder, command, named):
    result = flora(folder, command)
    assert result.exit_code == 2, result.output
    assert result.stderr.rstrip().splitlines()[-1].startswith("Error: ") and named in result.stderr
    assert not list((folder / "OUT").glob("[xy]*"))


@pytest.fixture
def small_disk():
    """Files of more than 2,000 bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "back_based"])
def test_a_full_disk_is_one_line_and_nothing_is_left(folder, command, small_disk):
    before = sorted(path for path in folder.rglob("*"))
    line = COMMANDS[command][0].replace("OUT/", "OUT/new/parent/").partition(" --verify")[0]
    result = flora(folder, line)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and "too large" in result.stderr.lower(), result.stderr
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_verification_says_what_it_does_not_cover(folder, tmp_path):
    assert flora(folder, f"compress adapter {tmp_path / 'same'} --energy 1 --verify base").exit_code == 0
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    shutil.copytree(folder / "adapter", tmp_path / "zero")
    zero = {key: tensor * 0 if "core" in key else tensor for key, tensor in tensors.items()}
    save_file(zero, tmp_path / "zero" / "adapter_model.safetensors")
    result = flora(folder, f"export lora {tmp_path / 'zero'} {tmp_path / 'lora'} --verify base")
    assert result.exit_code == 0 and "not verified: anything: the adapter changes no output" in result.stdout
