"""The keys of a job: one tree of dataclasses for the YAML, its overrides on the command line, and their help."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flora_lab.errors import ConfigError, SectionError
from flora_lab.methods import METHODS
from flora_lab.sources import place
from flora_lab.tasks import TASKS

SEEDS = 2**32 - 1  # the largest that numpy takes


# Metadata of a field: "help", for `--help`; limits of its value ("least", "most", "above", "choices"), of each element
# if it is a list; "path": a file or folder, in which ~ is expanded.


@dataclass
class Training:
    epochs: int = field(default=20, metadata={"help": "passes over the training split", "least": 1})
    max_steps: int | None = field(default=None, metadata={"help": "stop after this many optimizer steps", "least": 1})
    batch_size: int = field(default=32, metadata={"help": "examples per step and process", "least": 1})
    eval_batch_size: int | None = field(
        default=None, metadata={"help": "in evaluation; default: batch_size", "least": 1}
    )
    loaders: int = field(default=0, metadata={"help": "worker processes that load examples", "least": 0})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule", "above": 0})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up", "least": 0})
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW", "least": 0})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16", "choices": ("no", "bf16", "fp16")})
    eval_steps: int | None = field(
        default=None, metadata={"help": "steps between two evaluations and checkpoints; default: an epoch", "least": 1}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "save memory: compute activations again in the backward pass"}
    )

    def __post_init__(self):
        if self.mixed_precision == "False":  # YAML reads a bare no as False
            self.mixed_precision = "no"

    def decisive(self) -> dict[str, Any]:
        """The keys on which a training's numbers depend."""
        return {
            key: value for key, value in asdict(self).items() if key not in ("eval_steps", "gradient_checkpointing")
        }


@dataclass
class Variant:
    """A method with its options, under a name of the user's."""

    method: str | None = field(default=None, metadata={"help": "the method, if NAME is not one"})
    learning_rate: float | None = field(default=None, metadata={"help": "instead of the training's", "above": 0})
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of the method's config, such as LoraConfig or FloraConfig"}
    )


@dataclass
class Comparison:
    """What `flora compare` varies. Every variant gets the same number of trials."""

    budgets: list[int] = field(default_factory=list, metadata={"help": "several, instead of budget", "least": 1})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "of the head, the adapter and the order of examples", "least": 0, "most": SEEDS},
    )
    rates: list[float] = field(
        default_factory=lambda: [0.3, 1, 3],
        metadata={
            "help": "multiples of a variant's learning rate; rate_seeds try all, validation chooses",
            "above": 0,
        },
    )
    rate_seeds: int = field(
        default=1,
        metadata={"help": "how many of the seeds, from the first, try all rates; their mean decides", "least": 1},
    )
    engine: str = field(default="local", metadata={"help": "local or ray", "choices": ("local", "ray")})
    workers: int = field(default=1, metadata={"help": "trials that run at the same time", "least": 1})
    norms: int = field(default=0, metadata={"help": "how often to measure the updates per trial", "least": 0})


@dataclass
class Config:
    task: Any = field(default_factory=dict, metadata={"help": "the task, by name, and its own keys"})
    output: str = field(default="runs/default", metadata={"help": "folder for all results", "path": True})
    cache: str = field(
        default="runs/cache", metadata={"help": "folder of base models, shared between jobs", "path": True}
    )
    mirror: str | None = field(
        default=None, metadata={"help": "URL of fsspec (s3://, gs://, …) where a copy of output is kept and taken from"}
    )
    fresh: bool = field(default=False, metadata={"help": "delete the earlier results in output, and start over"})
    seed: int = field(
        default=0, metadata={"help": "of the splits, the weights and the order of examples", "least": 0, "most": SEEDS}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: torch's choice", "least": 1})
    budget: int = field(
        default=10_000, metadata={"help": "trainable parameters of an adapter, without the head", "least": 1}
    )
    target_modules: Any = field(default=None, metadata={"help": "what to adapt, instead of the task's choice"})
    pretraining: Training = field(default_factory=Training)
    training: Training = field(default_factory=Training)
    comparison: Comparison = field(default_factory=Comparison)
    methods: dict[str, Variant] = field(
        default_factory=dict, metadata={"help": f"the variants to train, by name: {', '.join(METHODS)}"}
    )

    def method_of(self, variant: str) -> str:
        """The key in `METHODS` of a variant's method."""
        return self.methods[variant].method or variant


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The job in the YAML at ``path``, with `key=value` overrides applied, checked against the dataclasses.

    In the YAML, `${package:NAME}` is the folder of an installed package, and `${source:NAME}` the place of data or
    weights that `flora data NAME` fetches. Raises ConfigError.
    """
    path = Path(path).expanduser()
    try:
        tree = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path}: expected keys and their values")
    for override in overrides:
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, RecursionError) as error:
            raise ConfigError(f"{override:.200}: {one_line(error)}") from error
    return build_config(tree)


def build_config(tree: Any) -> Config:
    """The dataclasses of a tree of keys. Raises ConfigError naming the key."""
    tree = OmegaConf.create(tree)
    keys = OmegaConf.structured(Config)
    for key in tree:
        try:
            if key == "task":
                keys.task = OmegaConf.structured(_task(tree))
            _need_sections(keys, {key: OmegaConf.to_container(tree)[key]})
            keys = OmegaConf.merge(keys, OmegaConf.masked_copy(tree, key))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key or key}: {one_line(error)}") from error
    if not keys.task:
        raise ConfigError(f"task.name: expected one of {', '.join(TASKS)}")
    where = "task.source."  # whose own checks say task.data, since its class is that of task.data
    try:
        if source := OmegaConf.select(keys, "task.source"):
            OmegaConf.to_object(source)
        where = "task.data."
        config = OmegaConf.to_object(keys)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {one_line(error)}") from error
    except ValueError as error:  # a task's own check of its keys
        raise ConfigError(str(error).replace("task.data.", where)) from error
    for node, name, key, metadata in _leaves(config):
        _check_limits(key, getattr(node, name), metadata)
        if metadata.get("path") and isinstance(OmegaConf.select(tree, key), bool):  # OmegaConf makes it a name
            raise ConfigError(f"{key}={str(getattr(node, name)).lower()}: expected a path")
        if metadata.get("path") and getattr(node, name):
            setattr(node, name, os.path.expanduser(getattr(node, name)))
    _check_methods(config)
    return config


def _need_sections(known: Any, given: Mapping[Any, Any], where: str = "") -> None:
    """Raise ConfigError for a value where keys are expected: OmegaConf names our classes, and not always the key."""
    for name, value in given.items():
        if name in known and OmegaConf.is_dict(section := known[name]):
            if isinstance(value, dict):
                _need_sections(section, value, f"{where}{name}.")
            elif value is not None and "${" not in str(value):
                raise ConfigError(f"{where}{name}: expected keys and their values, got {value!r:.80}")


def _check_methods(config: Config) -> None:
    for name in config.methods:
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it becomes the name of a folder
            raise ConfigError(f"methods.{name}: expected a name of letters, digits and _ . + -")
        if (method := config.methods[name].method) and method not in METHODS:
            raise ConfigError(f"methods.{name}.method={method}: expected one of {', '.join(METHODS)}")
    if not config.methods or not {config.method_of(name) for name in config.methods} <= set(METHODS):
        raise ConfigError(f"methods={', '.join(config.methods) or None}: expected some of {', '.join(METHODS)}")


def _package(name: str) -> str:
    spec = find_spec(name)
    if spec is None or not spec.origin:
        raise ValueError(f"the package {name} is not installed")
    return str(Path(spec.origin).parent)


OmegaConf.register_resolver("package", _package, replace=True)
OmegaConf.register_resolver("source", place, replace=True)


def _task(tree: Any) -> type:
    name = tree.task.get("name") if OmegaConf.is_dict(tree.task) else tree.task
    if name not in TASKS:
        raise ConfigError(f"task.name={name}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def one_line(error: Exception) -> str:
    """An error's message without line breaks; of OmegaConf's, only the first line, since the rest names its classes."""
    lines = [line.strip() for line in (getattr(error, "strerror", None) or str(error)).splitlines() if line.strip()]
    return lines[0] if isinstance(error, OmegaConfBaseException) else " ".join(lines) or type(error).__name__


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[Any, str, str, Mapping[str, Any]]]:
    """(dataclass, field, full key, metadata) of every field in the tree that holds no dataclass itself."""
    for each in fields(node):
        value = getattr(node, each.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{each.name}.")
        elif isinstance(value, dict) and any(map(is_dataclass, value.values())):
            for name, inner in value.items():
                yield from _leaves(inner, f"{prefix}{each.name}.{name}.")
        else:
            yield node, each.name, prefix + each.name, each.metadata


def _check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    for each in value if isinstance(value, list) else [value]:
        if each is not None and (expected := _violated(limits, each)):
            raise ConfigError(f"{key}={value}: expected {expected}")


def with_key(config: Config, error: ValueError) -> str:
    """The error's message in one line, with the key of the section that it is about, or of the path or name on the hub
    that it begins with: a value alone does not say where it was given."""
    message = one_line(error)
    for node, name, key, metadata in _leaves(config):
        if isinstance(error, SectionError):
            if node is error.section:
                return key.removesuffix(name) + message if error.key else f"{key.removesuffix(f'.{name}')}: {message}"
        elif metadata.get("path") and (value := getattr(node, name)):
            spelt = "|".join(map(re.escape, (value, str(Path(value)))))  # ./data becomes data where it is read
            if re.match(rf"'?({spelt})'?(:| is| has) ", message):
                return f"{key}={message}"
    return message


def _violated(limits: Mapping[str, Any], value: Any) -> str | None:
    if "above" in limits and not limits["above"] < value < math.inf:
        return f"a number above {limits['above']}"
    if "least" in limits and not limits["least"] <= value < math.inf:
        return f"at least {limits['least']}"
    if "most" in limits and value > limits["most"]:
        return f"at most {limits['most']}"
    if "choices" in limits and value not in limits["choices"]:
        return f"one of {', '.join(map(str, limits['choices']))}"
    return None
