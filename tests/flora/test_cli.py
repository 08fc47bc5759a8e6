"""The library's command line: its help, its overrides and `flora plan`. Conversions: test_cli_convert.py."""

import json
import re

import click
import pytest
from click.shell_completion import ShellComplete
from transformers import LlamaConfig

from commands import assert_refused, flora
from flora.cli import SECTIONS, main
from flora.keys import Commands, as_overrides
from flora.models import hub_name


def test_overrides_are_written_in_three_ways():
    assert as_overrides(["seed=1", "--budget=2", "--task.depths", "[1]"]) == ["seed=1", "budget=2", "task.depths=[1]"]
    assert as_overrides(["--fresh", "seed=1"]) == as_overrides(["--fresh", "--seed", "1"]) == ["fresh=true", "seed=1"]
    assert as_overrides(["--seed", "1", "--fresh"]) == ["seed=1", "fresh=true"]


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]])
def test_help(arguments):
    result = flora(*arguments)
    assert result.exit_code == 0 and not result.stderr


def test_help_lists_every_command_once_in_its_section():
    text = flora("--help").output
    sections = dict(re.findall(r"^(\S.*):\n((?:  .*\n)+)", text, re.MULTILINE))
    listed = [line.split()[0] for heading in SECTIONS for line in sections[heading].splitlines()]
    assert sorted(listed) == main.list_commands(click.Context(main)) and "Further commands" not in sections
    assert "..." not in "".join(sections[heading] for heading in SECTIONS)


def test_commands_outside_every_section_are_listed_too():
    group = Commands(sections={"First": ["a"]}, commands=[click.Command("a"), click.Command("b")])
    text = group.get_help(click.Context(group))
    assert re.search(r"First:\n  a\n\nFurther commands:\n.*  b\n", text, re.DOTALL)


def test_the_tab_key_completes_commands_and_options():
    def complete(*words):
        *before, last = words
        return {
            item.value for item in ShellComplete(main, {}, "flora", "_FLORA_COMPLETE").get_completions(before, last)
        }

    assert complete("ex") == {"export", "extract"}
    assert complete("export", "lo") == {"lora", "locon"}
    assert complete("merge", "--max") == {"--max-shard-size"}


def test_a_model_of_timm_is_planned_without_the_hub():
    result = flora("plan", "timm/resnet10t", "budget=0.01")
    assert result.exit_code == 0, result.output
    assert "timm_model.layer1.0.conv1" in result.output and "Conv2d" in result.output
    assert hub_name("timm/resnet18") == "timm/resnet18.a1_in1k" and hub_name("timm/no-such") == "timm/no-such"


def test_help_lists_every_key():
    assert "  kernel_rank " in flora("plan", "--help").output


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=100, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_plan_without_targets_shows_what_the_config_would_adapt(llama):
    result = flora("plan", llama, "r=2")
    assert result.exit_code == 0 and "v_proj" in result.output and "down_proj" not in result.output


def test_plan_shows_a_model_without_its_weights(llama):
    result = flora("plan", llama, "budget=0.05", "--kernel_rank", "2", "target_modules=all-weights")
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.down_proj" in result.output and "lm_head" not in result.output
    assert "trainable parameters" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rank=4", "rank: no field of FloraConfig; `flora plan --help` lists them; did you mean 'r'?"),
        ("lora_alpha=4", "did you mean 'scale'?"),
        ("budgt=4", "did you mean 'budget'?"),
        ("--budget", "--budget: expected a value, as in budget=VALUE"),
        ("r=" + "[" * 9000, "r=[["),
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


# what a config.json may hold in place of a model's: the text, or the keys that are changed
HOSTILE = {
    "deep": "[" * 100_000,
    "no object": "[]",
    "no type": "{}",
    "nul": "\x00",
    "type is a list": {"model_type": ["llama"]},
    "activation": {"hidden_act": "relu7"},
    "text for a number": {"hidden_size": "8"},
    "zero heads": {"num_attention_heads": 0},
    "negative": {"vocab_size": -1},
    "a function": {"architectures": ["set_seed"]},
    "no class": {"architectures": [3]},
    "a list of nothing": {"hidden_size": []},
    "diffusers, a function": {"_class_name": "logging"},
    "diffusers, a pipeline": {"_class_name": "DiffusionPipeline"},
    "diffusers, a number": {"_class_name": 3},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_one_line(content, llama, tmp_path):
    whole = json.loads((llama / "config.json").read_text())
    text = content if isinstance(content, str) else json.dumps({**whole, **content})
    (tmp_path / "config.json").write_text(text)
    assert_refused(flora("plan", tmp_path), str(tmp_path))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_pattern_that_never_ends_is_one_line(key, llama, monkeypatch):
    monkeypatch.setattr("flora.keys.PATTERN_SECONDS", 0.5)
    assert_refused(flora("plan", llama, f"{key}=(.?){{1,60}}(.?.?){{1,60}}Z"), "takes too long: give simpler ones")


def test_a_model_that_never_ends_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("flora.cli.planning.BUILD_SECONDS", 2)
    LlamaConfig(
        num_hidden_layers=10**9, hidden_size=8, num_attention_heads=2, architectures=["LlamaModel"]
    ).save_pretrained(tmp_path)
    assert_refused(flora("plan", tmp_path), "building this model takes too long")
