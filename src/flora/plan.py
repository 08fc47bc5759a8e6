"""Dry run: which weights would be adapted, at which ranks, at what cost. The tuner wraps exactly what this says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES, SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import TaskType
from torch import nn

from flora import kinds
from flora import ranks as rank_rules
from flora.config import FloraConfig
from flora.execution import choose

SHORTHANDS = ("all-linear", "all-weights")
# PEFT trains the whole head itself for these, which it can't do with adapters in it
HEAD_TASKS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
HEAD_NAMES = (*SEQ_CLS_HEAD_NAMES, "head", "heads", "fc", "lm_head", "qa_outputs")


@dataclass(frozen=True)
class Row:
    """One weight that is to be adapted.

    ``name``: the layer's, followed by the weight's where that is not plainly "weight". ``target``: what in
    ``target_modules`` or ``target_parameters`` (``raw``) names it. ``shared``: other modules hold this weight too.
    """

    name: str
    module: str
    parameter: str
    target: str
    raw: bool
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    scale: float | str
    execution: str
    shared: bool = False

    @property
    def parameters(self) -> int:
        return rank_rules.parameter_count(self.shape, self.ranks)


@dataclass(frozen=True)
class Plan:
    """The rows, and the base model's number of parameters. ``str()`` is the table."""

    rows: list[Row] = field(default_factory=list)
    base_parameters: int = 0

    @property
    def total(self) -> int:
        """Trainable parameters of all core spaces together."""
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float:
        """``total`` as a part of the base model's parameters."""
        return self.total / self.base_parameters if self.base_parameters else 0.0

    def rows_of(self, module: str) -> list[Row]:
        return [row for row in self.rows if row.module == module]

    def __str__(self) -> str:
        def sizes(numbers: Iterable[int]) -> str:
            return "×".join(map(str, numbers))

        head = ("weight", "kind", "shape", "ranks", "parameters", "execution")
        lines = [(r.name, r.kind, sizes(r.shape), sizes(r.ranks), f"{r.parameters:,}", r.execution) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

        def line(cells: Iterable[str]) -> str:
            cells = [c.rjust(w) if n == 4 else c.ljust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return "  ".join(cells).rstrip()

        total = (
            f"{len(self.rows)} weights, {self.total:,} trainable parameters, "
            f"{100 * self.share:.3g} % of the model's {self.base_parameters:,}"
        )
        return "\n".join([line(head), line("─" * w for w in widths), *map(line, lines), "", total])


def plan(model: nn.Module, config: FloraConfig) -> Plan:
    """What ``get_peft_model(model, config)`` would adapt. The model is not touched; the meta device is enough.

    Raises:
        ValueError: naming layer, shape, value given and what is accepted.
    """
    made = make_plan(model, config)
    if not made.rows:
        raise ValueError(
            f"no layer matches target_modules={config.target_modules!r}, target_parameters={config.target_parameters!r}"
        )
    return made


def make_plan(model: nn.Module, config: FloraConfig, keys: Iterable[str] | None = None) -> Plan:
    """As ``plan``, but empty where nothing matches. ``keys`` names the layers in place of the config."""
    layers = dict(base_layers(model))
    shorthand = keys is None and config.target_modules in SHORTHANDS
    wanted = list(_matching(model, layers, config)) if keys is None else [(key, "", key, False) for key in keys]
    targets: dict[tuple[str, str], tuple[str, bool]] = {}
    for module, parameter, target, raw in wanted:
        for place in _places(model, module, parameter, config):
            if place in targets and (raw or targets[place][1]):
                raise ValueError(f"{_name(*place)!r} is targeted twice: by target_modules and by target_parameters")
            targets.setdefault(place, (target, raw))
    shared = _shared_weights(layers)
    if shorthand:
        targets = {place: t for place, t in targets.items() if id(_parameter(layers, place)) not in shared}
    _refuse_weights_met_twice(layers, targets)
    _refuse_other_sets(model, targets)

    described = []
    for module, parameter in targets:
        try:
            described.append(kinds.describe(layers[module], parameter))
        except ValueError as error:
            raise ValueError(f"layer {module!r} ({type(layers[module]).__name__}): {error}") from None
    names = [_name(*place) for place in targets]
    base_parameters = count_base_parameters(model)
    ranks = _solve(names, list(targets), described, config, base_parameters)
    scales = _from_pattern("scale_pattern", config.scale_pattern, names, list(targets))
    rows = []
    for place, name, (kind, shape, _), rank, scale in zip(targets, names, described, ranks, scales, strict=True):
        module, parameter = place
        target, raw = targets[place]
        rows.append(
            Row(
                name=name,
                module=module,
                parameter=parameter,
                target=target,
                raw=raw,
                kind="parameter" if kind is None else type(layers[module]).__name__,
                shape=shape,
                ranks=rank,
                scale=config.scale if scale is None else scale,
                execution=choose(config.execution, kind, layers[module], _parameter(layers, place).dtype),
                shared=id(_parameter(layers, place)) in shared,
            )
        )
    return Plan(rows, base_parameters)


def check_saved(made: Plan, saved: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where an adapter's file doesn't have exactly the core spaces of the plan."""
    expected: dict[str, tuple[tuple[int, ...], Row]] = {}
    for module in dict.fromkeys(row.module for row in made.rows):
        for depth, row in enumerate(made.rows_of(module)):
            stem = module + ".base_layer" * depth + ".tucker_space."
            expected[stem + "core"] = (row.ranks, row)
            expected |= {
                f"{stem}factor_{n}": (pair, row) for n, pair in enumerate(zip(row.shape, row.ranks, strict=True))
            }
    if not expected.keys() & saved.keys():  # PEFT maps names of a base model whose modules have been renamed since
        needed = Counter((key.rpartition(".")[2], shape) for key, (shape, _) in expected.items())
        if needed == Counter((key.rpartition(".")[2], s) for key, s in saved.items() if not key.endswith(".scale")):
            return
    for key, (shape, row) in expected.items():
        if saved.get(key) != shape:
            found = list(saved[key]) if key in saved else "nothing"
            raise ValueError(
                f"layer {row.name!r}: the adapter's file has {found} for {key.rpartition('.')[2]}, but a weight of "
                f"shape {list(row.shape)} at ranks {list(row.ranks)} needs {list(shape)}; was it trained on another "
                "base model?"
            )
    if extra := sorted(key for key in saved if key not in expected and not key.endswith(".scale")):
        raise ValueError(f"the adapter's file has {extra[0]!r}, which is no weight of this base model that is adapted")


def base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, wrapped ones as their base layer, without what adapters have put in.

    The names are the same where torch.compile has wrapped the model.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{name}.")
        yield name.removeprefix("_orig_mod."), unwrapped(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The base layer of a wrapped one; any other module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def count_base_parameters(model: nn.Module) -> int:
    """Parameters of the model itself: each once, adapters' not counted."""
    added: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            kept = {id(p) for p in module.base_layer.parameters()}
            added |= {id(p) for p in module.parameters()} - kept
        elif isinstance(module, AuxiliaryTrainingWrapper):
            added |= {id(p) for name, p in module.named_parameters() if not name.startswith("original_module.")}
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in added}
    return sum(sizes.values())


# ----------------------------------------------------------------------------------------------------- what is targeted


def _matching(model: nn.Module, layers: dict, config: FloraConfig) -> Iterator[tuple[str, str, str, bool]]:
    """(module, parameter or "", target, raw) for everything that the config names, in the model's order."""
    if config.target_modules == DUMMY_TARGET_MODULES:
        return
    if config.target_modules in SHORTHANDS:
        names = shorthand_names(model, config)
    elif config.target_modules is None and config.target_parameters is None:
        names = []
    else:
        names = [name for name in layers if name and check_target_module_exists(config, name)]
    for name in names:
        if kinds.kind_of(layers[name]) is None:
            raise ValueError(
                f"layer {name!r} is a {type(layers[name]).__name__}, which can't be adapted; "
                f"supported: {kinds.supported()}"
            )
        yield name, "", name, False
    unmatched = set(config.target_parameters or ())
    for module, layer in layers.items():
        for parameter in layer._parameters if config.target_parameters else ():
            name = f"{module}.{parameter}"
            hits = {
                t
                for t in config.target_parameters
                if name == t or name.endswith(f".{t}") or (not module and parameter == t)
            }
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
    """The layers that "all-linear" or "all-weights" stands for: never the output head, nor what is excluded."""
    linear_only = config.target_modules == "all-linear"
    heads = _output_heads(model, config, linear_only)
    names = []
    for name, layer in base_layers(model):
        kind = kinds.kind_of(layer)
        if not name or kind is None or any(head is layer for head in heads):
            continue
        if linear_only and kind.name not in ("Linear", "Conv1D"):
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


def _output_heads(model: nn.Module, config: FloraConfig, linear_only: bool) -> list[nn.Module]:
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


def _name(module: str, parameter: str) -> str:
    return module if parameter == "weight" else f"{module}.{parameter}"


def _parameter(layers: dict, place: tuple[str, str]) -> nn.Parameter | None:
    module, parameter = place
    return kinds.owner(layers[module], parameter)._parameters.get(kinds.leaf(parameter))


def _shared_weights(layers: dict[str, nn.Module]) -> set[int]:
    """Weights that several modules hold: adapting one of them and merging would change the others."""
    counts = Counter(id(p) for layer in layers.values() for p in layer._parameters.values() if p is not None)
    return {key for key, count in counts.items() if count > 1}


def _refuse_weights_met_twice(layers: dict, targets: dict) -> None:
    seen: dict[int, tuple[str, str]] = {}
    for place in targets:
        parameter = _parameter(layers, place)
        first = seen.setdefault(id(parameter), place)
        if parameter is not None and first is not place:
            raise ValueError(
                f"{_name(*first)!r} and {_name(*place)!r} share one weight of shape {list(kinds.shape_of(parameter))}: "
                "target only one of them, or untie them first"
            )


def _refuse_other_sets(model: nn.Module, targets: dict) -> None:
    """Adapters of one layer must adapt the same weights of it: the nesting of wrappers is part of the file format."""
    wanted: dict[str, set[str]] = {}
    for module, parameter in targets:
        wanted.setdefault(module, set()).add(parameter)
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


# -------------------------------------------------------------------------------------------------------------- ranks


def _solve(names, places, described, config: FloraConfig, base_parameters: int) -> list[tuple[int, ...]]:
    weights = []
    patterns = _from_pattern("rank_pattern", config.rank_pattern, names, places)
    for name, rank, (_, shape, roles) in zip(names, patterns, described, strict=True):
        weight = rank_rules.Weight(shape, roles)
        asked = config.r if rank is None else rank
        try:
            fixed = None if asked is None else rank_rules.given_ranks(weight, asked, config.kernel_rank)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        weights.append(rank_rules.Weight(shape, roles, fixed))
    if config.ranks and set(config.ranks) == set(names):
        saved = [tuple(config.ranks[name]) for name in names]
        if all(
            len(r) == len(w.shape) and all(1 <= a <= b for a, b in zip(r, w.shape, strict=True))
            for r, w in zip(saved, weights, strict=True)
        ):
            return saved
    if config.budget is None or not weights:
        return [weight.fixed for weight in weights]
    budget = config.budget if isinstance(config.budget, int) else int(config.budget * base_parameters)
    return rank_rules.solve_budget(weights, budget, config.kernel_rank)


def _from_pattern(field_name: str, patterns: dict, names: list[str], places: list[tuple[str, str]]) -> list:
    """The pattern's value for every weight, None where no pattern matches. PEFT's rule: a name, the end of a name, or a
    regex for either; of a weight or of the layer that has it. A pattern that matches nothing is an error."""
    values, unused = [], set(patterns)
    for name, (module, _) in zip(names, places, strict=True):
        found = None
        for pattern, value in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", candidate) for candidate in (name, module)):
                unused.discard(pattern)
                found = value if found is None else found
        values.append(found)
    if unused and names:
        raise ValueError(f"{field_name}: {sorted(unused)} match none of the {len(names)} adapted weights")
    return values
