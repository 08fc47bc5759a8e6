"""A job's YAML, with the overrides of the command line, becomes a `Config`, or one line that says what is wrong."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from flora.text import did_you_mean
from flora_lab.errors import ConfigError, SectionError
from flora_lab.methods import METHODS
from flora_lab.settings import Config
from flora_lab.sources import place
from flora_lab.tasks import TASKS

VALUES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


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
    given = OmegaConf.to_container(tree)
    types = {"task": _task(given["task"])} if "task" in given else {}
    given = _shaped(given, Config, "", types)
    if not types.get("task"):
        raise ConfigError(f"task.name: expected one of {', '.join(TASKS)}")
    keys = OmegaConf.structured(Config)
    keys.task = OmegaConf.structured(types["task"])
    told: Callable[[str], str] = of_source
    try:
        keys = OmegaConf.merge(keys, given)
        if source := OmegaConf.select(keys, "task.source"):
            OmegaConf.to_object(source)
        told = str
        config = OmegaConf.to_object(keys)
    except OmegaConfBaseException as error:
        raise ConfigError(_refused(error, tree, types)) from error
    except ValueError as error:  # a task's own check of its keys
        raise ConfigError(told(str(error))) from error
    for node, name, key, metadata in _leaves(config):
        _check_limits(key, getattr(node, name), metadata)
        if metadata.get("path") and isinstance(OmegaConf.select(tree, key), bool):  # OmegaConf makes it a name
            raise ConfigError(f"{key}={str(getattr(node, name)).lower()}: expected a path")
        if metadata.get("path") and getattr(node, name):
            setattr(node, name, os.path.expanduser(getattr(node, name)))
    _check_methods(config)
    return config


def _shaped(value: Any, kind: Any, key: str, types: dict[str, Any]) -> Any:
    """The value, with an empty section in place of null where the type is a section: it keeps its defaults.

    Raises ConfigError for an unknown key, and for keys or a list where the type wants something else, or the reverse.
    OmegaConf would name our classes, and not always the key.

    Args:
        kind: the type of the value, unless ``types`` has one for this key.
        types: gets the type of every key that is given.
    """
    kind = types.setdefault(key, kind)
    optional = NoneType in get_args(kind)
    plain = get_args(kind)[0] if optional else kind
    if plain is Any or (isinstance(value, str) and "${" in value):
        return value
    if is_dataclass(plain) or get_origin(plain) is dict:
        if value is None:
            return None if optional else {}
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected keys and their values, got {value!r:.80}")
        kinds = _kinds_of(plain, value, key)
        return {name: _shaped(value[name], kind, _join(key, name), types) for name, kind in kinds.items()}
    if isinstance(value, list) and get_origin(plain) is list:
        return [_shaped(each, *get_args(plain), f"{key}[{index}]", types) for index, each in enumerate(value)]
    if isinstance(value, dict | list):
        raise ConfigError(f"{key}={value!r:.80}: expected {_spell(kind)}")
    return value


def _kinds_of(section: Any, names: Iterable[Any], key: str) -> dict[Any, Any]:
    """The type of each of a section's keys that is given. Raises ConfigError for one that the section does not have."""
    if not is_dataclass(section):
        return dict.fromkeys(names, get_args(section)[1])
    hints, known = get_type_hints(section), [each.name for each in fields(section)]
    for name in names:
        if name not in known:
            meant = did_you_mean(str(name), known) or f", expected some of {', '.join(known)}"
            raise ConfigError(f"{_join(key, name)}: no such key{meant}")
    return {name: hints[name] for name in names}


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _spell(kind: Any) -> str:
    """The values of a type, in words."""
    if get_origin(kind) is UnionType:
        return " or ".join(map(_spell, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list, each {_spell(*get_args(kind))}"
    return VALUES.get(kind, "keys and their values")


def _refused(error: OmegaConfBaseException, tree: Any, types: Mapping[str, Any]) -> str:
    key = error.full_key
    if isinstance(error, InterpolationResolutionError) or key not in types:
        return f"{key}: {one_line(error)}"
    value = OmegaConf.select(tree, key)
    return f"{key}={'null' if value is None else value!s:.80}: expected {_spell(types[key])}"


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


def _task(task: Any) -> type:
    name = task.get("name") if isinstance(task, dict) else task
    if not isinstance(name, str) or name not in TASKS:
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


def of_source(message: str) -> str:
    """What is told of the source's data: their class is that of the task's data, and calls them so."""
    return message.replace("task.data.", "task.source.")


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
