"""`flora init TASK`: one complete YAML for a user's own data, each key with its help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any, get_type_hints

import yaml

from flora_lab.settings import Config
from flora_lab.tasks import TASKS

WIDTH = 110
# what a first job sets; all other keys are there as comments, with their defaults
COMMON: dict[str, Any] = {
    "budget": 300_000,  # as all budgets here: half of it still suffices for rank 1 on the task's model
    "training": {"epochs": 10, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 20, "mixed_precision": "bf16"},
    "comparison": {"seeds": [0, 1, 2], "rates": [0.3, 1, 3]},
}
# where a task's first job differs
JOB_KEYS: dict[str, dict[str, Any]] = {
    "glue": {"budget": 100_000},
    "text_classification": {"budget": 500_000},
    "text_to_image": {"budget": 2_500_000, "training": {"batch_size": 4, "learning_rate": 1e-4}},
    "language": {"budget": 2_000_000, "training": {"epochs": 2, "batch_size": 4, "learning_rate": 2e-4}},
    "visual_instruction": {
        "budget": 20_000_000,
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 2e-4, "gradient_checkpointing": True},
    },
}
TASK_KEYS: dict[str, dict[str, Any]] = {
    "image_classification": {
        "model": {"name": "timm/convnextv2_tiny"},
        "data": {"path": "photos", "size": 224, "augment": True},
    },
    "text_classification": {
        "model": {"name": "microsoft/deberta-v3-base"},
        "data": {"path": "texts", "max_length": 128},
    },
    "glue": {
        "subset": "sst2",
        "model": {"name": "sentence-transformers/all-MiniLM-L6-v2"},
        "data": {"path": "sentences", "max_length": 128},
    },
    "semantic_segmentation": {
        "backbone": {"name": "facebook/convnextv2-tiny-22k-224"},
        "data": {"path": "scenes", "size": [512, 512], "augment": True},
    },
    "instance_segmentation": {
        "backbone": {"name": "timm/convnextv2_tiny"},
        "data": {"path": "coco", "augment": True},
    },
    "text_to_image": {
        "model": {"name": "stable-diffusion-v1-5/stable-diffusion-v1-5", "gradient_checkpointing": True},
        "data": {"path": "pictures", "size": 512},
        "noise": {"snr_gamma": 5},
        "samples": {"prompts": ["a lighthouse at dusk", "a fox in the snow"]},
    },
    "language": {
        "model": {"name": "Qwen/Qwen3-0.6B", "dtype": "bfloat16"},
        "data": {"path": "chats", "max_length": 1024, "longer": "leave_out"},
    },
    "visual_instruction": {
        "model": {"name": "llava-hf/llava-1.5-7b-hf", "dtype": "bfloat16", "load_in_4bit": True},
        "data": {"path": "talks"},
        "trained": ["multi_modal_projector"],
    },
    "oriented_detection": {
        "backbone": {"name": "timm/convnextv2_tiny"},
        "data": {"path": "aerial", "tile": 512, "overlap": 100, "augment": True},
    },
}
LAYOUTS = {
    "image_classification": "photos/CLASS/NAME.jpg, or photos/SPLIT/CLASS/NAME.jpg with train, validation and test",
    "text_classification": "texts/train.csv with the columns text and label; test.csv likewise (or .jsonl, .parquet)",
    "glue": "sentences/train.tsv and sentences/dev.tsv, with the columns sentence and label, 0 or 1",
    "semantic_segmentation": "scenes/images/NAME.jpg, and scenes/annotations/NAME.png whose pixels are class numbers",
    "instance_segmentation": "coco/train.json and coco/val.json in COCO's format, pictures in coco/train and coco/val",
    "text_to_image": "pictures/NAME.jpg, each with its caption in pictures/NAME.txt",
    "language": "chats/train.jsonl, a line each: messages, or prompt and completion, or text; test.jsonl likewise",
    "visual_instruction": "talks/train.json in LLaVA's form, and the pictures in talks",
    "oriented_detection": "aerial/train and aerial/val, each with images/NAME.png and labelTxt/NAME.txt as DOTA's",
}
METHODS = """\
# The variants to train, each under a name of yours. `method` is the method if the name is none, `options` the fields of
# its config: FloraConfig's or PEFT's. `flora train --help` lists the methods.
methods:
"""
FULL = "  full: {learning_rate: 1e-4}  # every weight is trained: what an adapter is measured against\n"
HEAD = "  head: {learning_rate: 1e-2}  # the new head alone\n"
ADAPTERS = "  lora: {}\n  flora: {}\n"
GRADIENT = "  flora-gradient: {method: flora, options: {init: gradient}}  # for convolutional networks\n"
VARIANTS = {
    "text_classification": FULL + HEAD + ADAPTERS,
    "glue": FULL + HEAD + ADAPTERS,
    "text_to_image": ADAPTERS + "  flora-activations: {method: flora, options: {init: activations}}\n",
    "language": ADAPTERS,
    "visual_instruction": ADAPTERS,
}


def starter(task: str) -> str:
    """The YAML's text. ``task``: a key of TASKS."""
    own = JOB_KEYS.get(task, {})
    keys = {"output": f"runs/{task}", **COMMON, **own, "training": COMMON["training"] | own.get("training", {})}
    head = [
        f"# {task}, written by `flora init`. A key after a # has its default; take the # away to set it.",
        f"# Train:    flora train {task}.yaml",
        f"# Compare:  flora compare {task}.yaml --budgets {keys['budget'] // 2},{keys['budget']}",
        f"# The data: {LAYOUTS[task]}",
        "",
        "task:",
        f"  name: {task}",
        *_lines(TASKS[task], TASK_KEYS[task], "  ", without=("name",)),
        "",
        *_lines(Config, keys, "", without=("task", "methods", "pretraining")),
    ]
    return "\n".join(head) + "\n\n" + METHODS + VARIANTS.get(task, FULL + HEAD + ADAPTERS + GRADIENT)


def _lines(config: type, values: Mapping[str, Any], indent: str, without: tuple[str, ...] = ()) -> Iterator[str]:
    """A dataclass as YAML: a comment and a line for each key."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in without:
            continue
        text = str(field.metadata.get("help", ""))
        inner = types[field.name] if dataclasses.is_dataclass(types[field.name]) else None
        if inner is not None:
            mark = "" if field.name in values else "#"
            yield from ("", f"{indent}{mark}{field.name}:")
            yield from _lines(inner, values.get(field.name, {}), f"{indent}  ")
            continue
        yield from (f"{indent}# {line}" for line in wrap(text, WIDTH - len(indent)))
        if field.name in values:
            yield f"{indent}{field.name}: {_value(values[field.name])}"
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield f"{indent}#{field.name}: {_value(default)}"


def _value(value: Any) -> str:
    """A value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
