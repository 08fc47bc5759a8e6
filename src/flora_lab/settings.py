"""The keys of a job: one tree of dataclasses, which is its YAML, its overrides on the command line and their help."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flora_lab.methods import METHODS
from flora_lab.tasks import TASKS

SEEDS = 2**32 - 1  # the largest that numpy takes


class ConfigError(ValueError):
    """What a person asked for and can mend, said in one line."""


@dataclass
class Training:
    epochs: int = field(default=20, metadata={"help": "passes over the training split", "least": 1})
    max_steps: int | None = field(default=None, metadata={"help": "stop there, if epochs have more steps", "least": 1})
    batch_size: int = field(default=32, metadata={"help": "examples a step, in each process", "least": 1})
    eval_batch_size: int | None = field(default=None, metadata={"help": "in place of batch_size", "least": 1})
    loaders: int = field(default=0, metadata={"help": "processes that prepare examples", "least": 0})
    learning_rate: float = field(default=1e-3, metadata={"help": "highest of the cosine schedule", "above": 0})
    warmup_steps: int = field(default=0, metadata={"help": "steps up to that rate", "least": 0})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's", "least": 0})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16", "choices": ("no", "bf16", "fp16")})

    def __post_init__(self):
        if self.mixed_precision == "False":  # what YAML makes of a bare no
            self.mixed_precision = "no"


@dataclass
class Method:
    method: str | None = field(
        default=None, metadata={"help": "what it is, where NAME is not: a second flora with other options"}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "in place of training's", "above": 0})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "fields of its LoraConfig or FloraConfig"})


@dataclass
class Comparison:
    """What `flora compare` varies. Every method gets the same number of trials."""

    budgets: list[int] = field(default_factory=list, metadata={"help": "in place of budget", "least": 1})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "of head, adapter, order", "least": 0, "most": SEEDS}
    )
    rates: list[float] = field(
        default_factory=lambda: [0.3, 1, 3],
        metadata={"help": "times a method's learning rate: tried on the first seed, chosen on validation", "above": 0},
    )
    engine: str = field(default="local", metadata={"help": "local or ray", "choices": ("local", "ray")})
    workers: int = field(default=1, metadata={"help": "runs at a time", "least": 1})
    norms: int = field(default=0, metadata={"help": "how often to measure the updates in a run", "least": 0})


@dataclass
class Config:
    task: Any = field(default_factory=dict, metadata={"help": "the job, by name, and its own keys"})
    output: str = field(default="runs/default", metadata={"help": "folder for all that this run writes"})
    cache: str = field(default="runs/cache", metadata={"help": "folder of base models, shared by runs"})
    fresh: bool = field(default=False, metadata={"help": "start over, delete this run's earlier results"})
    seed: int = field(
        default=0, metadata={"help": "decides splits, first weights, order of examples", "least": 0, "most": SEEDS}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; without it as torch chooses", "least": 1})
    budget: int = field(default=10_000, metadata={"help": "trainable parameters of an adapter, head aside", "least": 1})
    target_modules: Any = field(default=None, metadata={"help": "what adapters adapt, in place of the task's choice"})
    pretraining: Training = field(default_factory=Training)
    training: Training = field(default_factory=Training)
    comparison: Comparison = field(default_factory=Comparison)
    methods: dict[str, Method] = field(default_factory=dict, metadata={"help": f"any of {', '.join(METHODS)}"})

    def way(self, name: str) -> str:
        """The key in `METHODS` of a method of this job."""
        return self.methods[name].method or name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The YAML at `path` with `key=value` overrides on top, checked against the dataclasses.

    `${package:NAME}` in it is the folder of an installed package.
    """
    try:
        given = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise ConfigError(f"{path}: expected keys and their values")
    for override in overrides:
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"{override}: {one_line(error)}") from error
    return checked(given)


def checked(given: Any) -> Config:
    """The dataclasses, of a tree of keys."""
    given = OmegaConf.create(given)
    keys = OmegaConf.structured(Config)
    for key in given:
        try:
            if key == "task":
                keys.task = OmegaConf.structured(_task(given))
            keys = OmegaConf.merge(keys, OmegaConf.masked_copy(given, key))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key or key}: {one_line(error)}") from error
    if not keys.task:
        raise ConfigError(f"task.name: expected one of {', '.join(TASKS)}")
    try:
        config = OmegaConf.to_object(keys)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {one_line(error)}") from error
    except ValueError as error:  # a task refused its own keys
        raise ConfigError(str(error)) from error
    _check_limits(config)
    for name in config.methods:
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it names a folder
            raise ConfigError(f"methods.{name}: expected a name of letters, digits and _ . + -")
    if not config.methods or not {config.way(name) for name in config.methods} <= set(METHODS):
        raise ConfigError(f"methods={', '.join(config.methods) or None}: expected some of {', '.join(METHODS)}")
    return config


def _package(name: str) -> str:
    found = find_spec(name)
    if found is None or not found.origin:
        raise ValueError(f"the package {name} is not installed")
    return str(Path(found.origin).parent)


OmegaConf.register_resolver("package", _package, replace=True)


def _task(given: Any) -> type:
    name = given.task.get("name") if OmegaConf.is_dict(given.task) else given.task
    if name not in TASKS:
        raise ConfigError(f"task.name={name}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def one_line(error: Exception) -> str:
    """An error's message without line breaks; of OmegaConf's the first line, since the rest names its own classes."""
    lines = [line.strip() for line in (getattr(error, "strerror", None) or str(error)).splitlines() if line.strip()]
    return lines[0] if isinstance(error, OmegaConfBaseException) else " ".join(lines) or type(error).__name__


def _check_limits(node: Any, prefix: str = "") -> None:
    """Hold every value, and each of a list, against the limits in its field's metadata."""
    if is_dataclass(node):
        children = [(f.name, getattr(node, f.name), f.metadata) for f in fields(node)]
    else:
        children = [(name, value, {}) for name, value in node.items()]
    for name, value, limits in children:
        if is_dataclass(value) or isinstance(value, dict):
            _check_limits(value, f"{prefix}{name}.")
            continue
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (wrong := _beyond(limits, each)):
                raise ConfigError(f"{prefix}{name}={value}: {wrong}")


def _beyond(limits: Mapping[str, Any], value: Any) -> str | None:
    if "above" in limits and not limits["above"] < value < math.inf:
        return f"expected a number above {limits['above']}"
    if "least" in limits and not limits["least"] <= value < math.inf:
        return f"expected at least {limits['least']}"
    if "most" in limits and value > limits["most"]:
        return f"expected at most {limits['most']}"
    if "choices" in limits and value not in limits["choices"]:
        return f"expected one of {', '.join(map(str, limits['choices']))}"
    return None
