"""Targets: from the config's names, patterns and shorthands to the weights of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peft import TaskType
from torch import nn

from flora.layers import kinds
from flora.layers.weights.parameters import full_name, parameter_of, shape_of
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import (
    DUMMY_TARGET_MODULES,
    SEQ_CLS_HEAD_NAMES,
    TARGET_MODULES,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    check_target_module_exists,
)

SHORTHANDS = ("all-linear", "all-weights")
# PEFT trains the whole head itself for these, which it can't do with adapters in it
HEAD_TASKS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
HEAD_NAMES = (*SEQ_CLS_HEAD_NAMES, "head", "heads", "fc", "lm_head", "qa_outputs")


@dataclass(frozen=True)
class Target:
    """One weight that the config names.

    Args:
        module, parameter: the layer's name, and the weight's name in the layer.
        entry: the entry of ``target_modules``, or of ``target_parameters`` if ``raw``, that names it.
        layer: the base layer.
        weight: its parameter; None if the layer computes it.
        shared: whether other modules hold it too.
        aliases: further names of the layer.
    """

    module: str
    parameter: str
    entry: str
    raw: bool
    layer: nn.Module
    weight: nn.Parameter | None
    shared: bool
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The layer's name, followed by the weight's unless that is plainly "weight"."""
        return full_name(self.module, self.parameter)


def find_targets(model: nn.Module, config: FloraConfig, keys: Iterable[str] | None = None) -> list[Target]:
    """The weights that the config names, or those of the layers ``keys``.

    Raises ValueError for a layer that cannot be adapted, a name that matches no parameter, or a weight named twice.
    """
    layers = dict(base_layers(model))
    called: dict[nn.Module, list[str]] = {}
    for name, layer, _ in every_name(model):
        called.setdefault(layer, []).append(name)
    shared = _shared_weights(layers)
    wanted = _matching(model, layers, config) if keys is None else [(key, "", key, False) for key in keys]
    found: dict[str, Target] = {}
    for key, own, entry, raw in wanted:
        for module, parameter in _places(model, key, own, config):
            layer = layers[module]
            weight = parameter_of(layer, parameter)
            aliases = tuple(called[layer][1:])
            target = Target(module, parameter, entry, raw, layer, weight, id(weight) in shared, aliases)
            before = found.setdefault(target.name, target)
            if before is not target and (raw or before.raw):
                raise ValueError(f"{target.name!r} is targeted twice: by target_modules and by target_parameters")
    return list(found.values())


def default_targets(model: nn.Module, config: FloraConfig) -> str | set[str]:
    """What a config without targets means: LoRA's default where PEFT has one for the model's type, else "all-weights".

    Raises ValueError if the config counts layers, which needs names.
    """
    own = getattr(model, "config", None)
    model_type = own.get("model_type") if isinstance(own, dict) else getattr(own, "model_type", None)
    names = TARGET_MODULES.get(model_type, "all-weights")
    if isinstance(names, str) and config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform} needs a list of names in target_modules; the default "
            f"for this model is {names!r}"
        )
    return names if isinstance(names, str) else set(names)


def base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model by name: base layers in place of their wrappers, and no modules of adapters.

    torch.compile's wrapper does not change the names.
    """
    return ((name, layer) for name, layer, again in every_name(model) if not again)


def every_name(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """As ``base_layers``, with the further names of a module, which say so."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, bool]]:
        layer = unwrapped(module)
        again = layer in seen
        yield name.removeprefix("_orig_mod."), layer, again
        if not again:
            seen.add(layer)
            for leaf, child in () if isinstance(layer, AuxiliaryTrainingWrapper) else layer._modules.items():
                if child is not None:
                    yield from walk(child, f"{name}.{leaf}" if name else leaf)

    yield from walk(model, "")


def unwrapped(module: nn.Module) -> nn.Module:
    """The base layer of a wrapper; any other module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _matching(model: nn.Module, layers: dict, config: FloraConfig) -> Iterator[tuple[str, str, str, bool]]:
    """(module, parameter or "", entry, raw) for everything that the config names, in the model's order."""
    if config.target_modules == DUMMY_TARGET_MODULES:
        return
    if config.target_modules in SHORTHANDS:
        names = shorthand_names(model, config)
    elif config.target_modules is None and config.target_parameters is None:
        names = []
    else:
        first = {layer: name for name, layer in layers.items()}
        every = every_name(model)
        names = [first[layer] for name, layer, _ in every if name and check_target_module_exists(config, name)]
    for name in dict.fromkeys(names):
        if kinds.kind_of(layers[name]) is None:
            raise ValueError(
                f"layer {name!r} is a {type(layers[name]).__name__}, which can't be adapted; "
                f"supported: {kinds.supported()}"
            )
        yield name, "", name, False
    wanted = config.target_parameters or []
    unmatched = set(wanted)
    for module, layer in layers.items():
        for parameter in layer._parameters if wanted else ():
            name = f"{module}.{parameter}"
            hits = {t for t in wanted if name == t or name.endswith(f".{t}") or (not module and parameter == t)}
            if not hits:
                continue
            unmatched -= hits
            if not module:
                raise ValueError(
                    "Targeting an nn.Parameter on the top-level module is not supported "
                    f"(parameter {parameter!r}): only a submodule's can be adapted"
                )
            yield module, parameter, name, True
    if unmatched:
        raise ValueError(f"target_parameters {sorted(unmatched)} match no parameter of the model")


def shorthand_names(model: nn.Module, config: FloraConfig) -> list[str]:
    """The layers that "all-linear" or "all-weights" stands for: neither the output head nor excluded layers."""
    linear_only = config.target_modules == "all-linear"
    heads = _output_heads(model, config, linear_only)
    names = []
    for name, layer in base_layers(model):
        kind = kinds.kind_of(layer)
        if not name or kind is None or any(head is layer for head in heads):
            continue
        if linear_only and not kind.is_matrix:
            continue
        if not linear_only and canonical_module(model, name) != name:
            continue  # comes with its attention
        if not _excluded(config, name):
            names.append(name)
    return names


def _excluded(config: FloraConfig, name: str) -> bool:
    probe = type("Everything", (), {"target_modules": ".*", "target_parameters": None})()
    probe.exclude_modules, probe.modules_to_save = config.exclude_modules, config.modules_to_save
    return not check_target_module_exists(probe, name)


def _output_heads(model: Any, config: FloraConfig, linear_only: bool) -> list[nn.Module]:
    """The layers that make the output: the language model's head, the classifier's last layer."""
    heads = []
    try:
        heads.append(model.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        pass
    trained = config.task_type in HEAD_TASKS
    if linear_only and ((heads != [None] and heads) or not trained):
        return heads
    for name in (*SEQ_CLS_HEAD_NAMES, "qa_outputs") if linear_only else HEAD_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            parts = [unwrapped(part) for part in head.modules()]
            parts = [part for part in parts if kinds.kind_of(part) is not None]
            heads.extend(parts if trained else parts[-1:])
    return heads


def canonical_module(model: nn.Module, name: str) -> str:
    """The module that is wrapped when ``name`` is targeted: an attention's out_proj is used by its weight, without its
    forward, so it is adapted through the attention."""
    parent, _, leaf = name.rpartition(".")
    if leaf != "out_proj":
        return name
    return parent if isinstance(unwrapped(model.get_submodule(parent)), nn.MultiheadAttention) else name


def _places(model: nn.Module, module: str, parameter: str, config: FloraConfig) -> list[tuple[str, str]]:
    """(module, parameter) pairs of one target."""
    attention = canonical_module(model, module)
    if attention != module:
        return [(attention, f"out_proj.{parameter or 'weight'}")]
    if parameter:
        return [(module, parameter)]
    names = kinds.weight_names(unwrapped(model.get_submodule(module)))
    return [
        (module, name)
        for name in names
        if "." not in name or not _excluded(config, f"{module}.{name.rpartition('.')[0]}")
    ]


def _shared_weights(layers: dict[str, nn.Module]) -> set[int]:
    """Weights that several modules hold: adapting one of them and merging would change the others."""
    counts = Counter(id(p) for layer in layers.values() for p in layer._parameters.values() if p is not None)
    return {key for key, count in counts.items() if count > 1}


def refuse_clashes(model: nn.Module, targets: list[Target]) -> None:
    """Raise ValueError for a weight that two targets share, and for a layer whose adapters differ in their weights."""
    _refuse_weights_met_twice(targets)
    _refuse_other_sets(model, targets)


def _refuse_weights_met_twice(targets: list[Target]) -> None:
    seen: dict[int, Target] = {}
    for target in targets:
        first = seen.setdefault(id(target.weight), target)
        if target.weight is not None and first is not target:
            raise ValueError(
                f"{first.name!r} and {target.name!r} share one weight of shape {list(shape_of(target.weight))}: "
                "target only one of them, or untie them first"
            )


def _refuse_other_sets(model: nn.Module, targets: list[Target]) -> None:
    """Adapters of one layer must adapt the same weights of it: the nesting of wrappers is part of the file format."""
    wanted: dict[str, set[str]] = {}
    for target in targets:
        wanted.setdefault(target.module, set()).add(target.parameter)
    for module, parameters in wanted.items():
        layer, present = model.get_submodule(module), set()
        while isinstance(layer, BaseTunerLayer):
            if hasattr(layer, "tucker_space"):
                present.add(layer.parameter_name)
            layer = layer.base_layer
        if present and present != parameters:
            raise ValueError(
                f"layer {module!r} already has adapters of {sorted(present)}; a further one must adapt the same "
                f"weights, got {sorted(parameters)}"
            )
