"""The library's command line: its help, its overrides and `flora plan`. Conversions: test_cli_convert.py."""

import pytest
from transformers import LlamaConfig

from commands import assert_refused, flora
from flora.cli import as_overrides


def test_overrides_are_written_in_three_ways():
    assert as_overrides(["seed=1", "--budget=2", "--task.depths", "[1]"]) == ["seed=1", "budget=2", "task.depths=[1]"]
    assert as_overrides(["--fresh", "seed=1"]) == as_overrides(["--fresh", "--seed", "1"]) == ["fresh=true", "seed=1"]
    assert as_overrides(["--seed", "1", "--fresh"]) == ["seed=1", "fresh=true"]


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]])
def test_help(arguments):
    result = flora(*arguments)
    assert result.exit_code == 0 and not result.stderr


def test_help_lists_every_key():
    assert "  kernel_rank " in flora("plan", "--help").output


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=100, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_plan_shows_a_model_without_its_weights(llama):
    result = flora("plan", llama, "budget=0.05", "--kernel_rank", "2")
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.down_proj" in result.output and "lm_head" not in result.output
    assert "trainable parameters" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rank=4", "rank: no field of FloraConfig"),
        ("r=0", "r must be"),
        ("r=[4", "r=[4"),
        ("budget=7", "7"),
        ("budget=lots", "budget"),
        ("target_modules=[zzz]", "zzz"),
        ("r", "r: expected key=value"),
    ],
)
def test_a_bad_plan_is_one_line(override, named, llama):
    assert_refused(flora("plan", llama, override), named)


def test_plan_of_no_model_is_one_line(tmp_path):
    assert_refused(flora("plan", tmp_path / "none"), "none: no such file or folder")
    assert_refused(flora("plan", tmp_path), str(tmp_path))
