"""flora without extras: every module imports, commands say what they lack, and help and a typo answer at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import flora

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def minimal(tmp_path_factory) -> dict:
    """What minimal.py prints."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes, vocab_size=20, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    script = Path(__file__).with_name("minimal.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_extras_are_hidden(minimal):
    assert {"omegaconf", "datasets", "diffusers", "matplotlib", "sklearn", "timm", "torchvision"} <= {
        *minimal["hidden"]
    }
    assert not {"torch", "peft", "click", "yaml", "numpy", "flora"} & {*minimal["hidden"]}


def test_every_module_imports(minimal):
    files = SOURCE.glob("flora/**/*.py")
    names = {".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for file in files}
    assert minimal["modules"].keys() == names - {"flora"}
    assert {name: error for name, error in minimal["modules"].items() if error} == {}


def test_help_and_a_typo_answer_before_anything_heavy_is_imported(minimal):
    for line, answer in minimal["commands"].items():
        if line != "train x":
            assert answer["loaded"] == [], line
    assert "train" in minimal["commands"]["--help"]["out"] and minimal["commands"]["--version"]["code"] == 0
    assert minimal["commands"]["tarin x"]["code"] == 2 and "tarin" in minimal["commands"]["tarin x"]["err"]


def test_a_command_of_the_laboratory_says_in_one_line_what_to_install(minimal):
    answer = minimal["commands"]["train x"]
    assert answer["code"] == 2 and not answer["out"]
    assert re.fullmatch(r"Error: \w+ is not installed: pip install 'flora-peft\[train\]'\n", answer["err"])


def test_plan_needs_no_extra(minimal):
    assert minimal["plan"]["code"] == 0, minimal["plan"]["err"]
    assert "model.layers.0.self_attn.v_proj" in minimal["plan"]["out"]


def test_looking_for_peft_leaves_the_hook_that_registers_flora(monkeypatch):
    """transformers asks whether PEFT is there before anything imports it."""
    monkeypatch.setattr(sys, "meta_path", [flora._AfterPeft, *sys.meta_path])
    for _ in range(2):
        spec = flora._AfterPeft.find_spec("peft")
        assert spec.loader.exec_module.__name__ == "load_and_register"
    assert flora._AfterPeft in sys.meta_path
