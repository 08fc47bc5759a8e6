"""Every code block of README and docs/ runs as it is printed, on tiny models that lie where the hub's names lead to.

What exists here is a path, also for transformers and datasets: so the blocks need no network. Only a budget that is a
share of the model is raised, since 1 % of a tiny model is less than rank 1.
"""

from __future__ import annotations

import ast
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import transformers as hf
from PIL import Image

import flora
import flora.convert
from flora.cli import main
from flora.keys import KeyedCommand, as_overrides

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 60, "pad_token_id": 1, "bos_token_id": 2,
    "eos_token_id": 3, "decoder_start_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 3, "use_timm_backbone": False,
    "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def detr() -> hf.DetrForObjectDetection:
    backbone = hf.ResNetConfig(embedding_size=8, out_features=["stage4"], **STAGES)
    return hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone, **DETR))


def upernet() -> hf.UperNetForSemanticSegmentation:
    backbone = hf.ConvNextConfig(out_features=["stage1", "stage2", "stage3", "stage4"], **STAGES)
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, hidden_size=16))


def wav2vec2() -> hf.Wav2Vec2Model:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    extra = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
    return hf.Wav2Vec2Model(
        hf.Wav2Vec2Config(
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8, **extra, **sizes
        )
    )


def moe() -> hf.Qwen3MoeForCausalLM:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**TEXT, **HEADS, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    )


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "facebook/convnextv2-tiny-1k-224": lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**STAGES)),
    "facebook/detr-resnet-50": detr,
    "openmmlab/upernet-convnext-tiny": upernet,
    "HuggingFaceTB/SmolLM2-135M": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
    "Qwen/Qwen3-30B-A3B": moe,
    "openai/whisper-tiny": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
    "facebook/wav2vec2-base": wav2vec2,
}


def write(name: str) -> None:
    """A model, or a data set, under the name that a page has for it."""
    if name == "photos":
        for number in range(4):
            file = Path("photos", "train", ("cat", "dog")[number % 2], f"{number}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 60 * number, np.uint8)).save(file)
    else:
        MODELS[name]().save_pretrained(name)
    if name == "facebook/convnextv2-tiny-1k-224":
        hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0).save_pretrained(name)


# what a block of a page leaves to the reader
BEFORE = {
    "choosing.md": """
        import flora, torch
        from peft import get_peft_model
        from transformers import AutoModelForImageClassification
        from flora import FloraConfig
        model = AutoModelForImageClassification.from_pretrained("facebook/convnextv2-tiny-1k-224", num_labels=2,
                                                                ignore_mismatched_sizes=True)
        batches = [{"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([0, 1])}] * 2
    """,
    "quantized.md": """
        name, steps = "HuggingFaceTB/SmolLM2-135M", 1
        data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    """,
}


def blocks(page: Path, *kinds: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = [
        *filter(None, [re.sub(r"^ {8}", "", BEFORE.get(page.name, ""), flags=re.MULTILINE)]),
        *blocks(page, "python"),
    ]
    for name in (*MODELS, "photos"):
        if any(f'"{name}"' in block for block in code):
            write(name)
    names: dict = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a data set without pad token, a processor's rescaling …
        for block in code:
            exec(compile(re.sub(r"budget=0\.\d+", "budget=0.6", block), str(page), "exec"), names)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line that begins with `flora`, continued lines joined."""
    found = []
    for page in PAGES:
        for block in blocks(page, "", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["flora"]:
                    found.append((str(page.relative_to(ROOT)), shlex.join(words[1:])))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_those_that_flora_has(page, line):
    words, command, context = shlex.split(line), main, click.Context(main)
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"{page}: flora has no command {name!r}"
    context = click.Context(command, info_name=line)
    command.parse_args(context, words)  # refuses unknown options and missing arguments
    if isinstance(command, KeyedCommand):
        known = {key for key, _ in command.rows()}
        for override in as_overrides(context.params["overrides"]):
            key = override.partition("=")[0]
            assert key in known or key.split(".")[0] in ("methods",), f"{page}: {key!r} is no key of {line!r}"


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert listed - {"flora.FloraConfig.like"} == {f"flora.{name}" for name in flora.__all__} | {
        f"flora.convert.{name}" for name in flora.convert.__all__
    }


def test_the_site_has_every_page_and_links_lead_somewhere():
    nav = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent != ROOT} <= nav
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#\S*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_blocks_are_whole_programs():
    """Copied alone into a file, a guide's block still names all that it uses from elsewhere."""
    for page in (ROOT / "docs" / "guides").glob("*.md"):
        for block in blocks(page, "python"):
            assert any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(block).body), page
