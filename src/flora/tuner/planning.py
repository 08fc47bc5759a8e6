"""Dry run: which weights would be adapted, at which ranks, at what cost. The tuner wraps exactly what this says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from flora import ranks as rank_rules
from flora.layers import kinds
from flora.tuner.config import FloraConfig
from flora.tuner.targets import Target, find_targets


@dataclass(frozen=True)
class Row:
    """One weight that is to be adapted.

    ``site``: where it is. ``kind``: the layer's class, "parameter" for a raw one. ``target``: what in
    ``target_modules`` or ``target_parameters`` (``raw``) names it. ``shared``: other modules hold this weight too.
    """

    site: kinds.Site
    target: str
    raw: bool
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    scale: float | str
    execution: str
    shared: bool = False

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def module(self) -> str:
        return self.site.module

    @property
    def parameter(self) -> str:
        return self.site.parameter

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
    targets = find_targets(model, config, keys)
    described = []
    for target in targets:
        try:
            described.append(kinds.describe(target.layer, target.parameter))
        except ValueError as error:
            raise ValueError(f"layer {target.module!r} ({type(target.layer).__name__}): {error}") from None
    base_parameters = count_base_parameters(model)
    ranks = _solve(targets, described, config, base_parameters)
    scales = _from_pattern("scale_pattern", config.scale_pattern, targets)
    rows = [
        Row(
            site=kinds.Site.of(target.layer, kind, target.module, target.parameter, path),
            target=target.named,
            raw=target.raw,
            kind="parameter" if kind is None else type(target.layer).__name__,
            shape=shape,
            ranks=rank,
            scale=config.scale if scale is None else scale,
            execution=kinds.possible(config.execution, kind, target.layer, shape),
            shared=target.shared,
        )
        for target, (kind, shape, _), rank, scale, path in zip(
            targets, described, ranks, scales, _paths(targets), strict=True
        )
    ]
    return Plan(rows, base_parameters)


def _paths(targets: list[Target]) -> list[str]:
    """Where each one's wrapper is in the adapted model: a wrapper a weight lies around its module. Raw parameters are
    wrapped last, and within either sort the first one is outermost."""
    order: dict[str, list[str]] = {}
    for target in sorted(targets, key=lambda target: not target.raw):
        order.setdefault(target.module, []).append(target.name)

    def path(target: Target) -> str:
        parts = target.module.split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts))]
        depths = [len(order.get(module, ())) for module in modules[:-1]] + [order[target.module].index(target.name)]
        return ".".join(part + ".base_layer" * depth for part, depth in zip(parts, depths, strict=True))

    return [path(target) for target in targets]


def check_saved(made: Plan, saved: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where an adapter's file doesn't have exactly the core spaces of the plan."""
    expected: dict[str, tuple[tuple[int, ...], Row]] = {}
    for row in made.rows:
        stem = f"{row.site.stem}.tucker_space."
        expected[stem + "core"] = (row.ranks, row)
        expected |= {f"{stem}factor_{n}": (pair, row) for n, pair in enumerate(zip(row.shape, row.ranks, strict=True))}
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


def _solve(
    targets: list[Target], described: list[tuple], config: FloraConfig, base_parameters: int
) -> list[tuple[int, ...]]:
    """Ranks: those saved with the adapter, else what patterns, ``r`` or the budget ask for."""
    weights = []
    patterns = _from_pattern("rank_pattern", config.rank_pattern, targets)
    for target, rank, (_, shape, roles) in zip(targets, patterns, described, strict=True):
        weight = rank_rules.Weight(shape, roles)
        asked = config.r if rank is None else rank
        try:
            fixed = None if asked is None else rank_rules.given_ranks(weight, asked, config.kernel_rank)
        except ValueError as error:
            raise ValueError(f"layer {target.name!r}: {error}") from None
        weights.append(rank_rules.Weight(shape, roles, fixed))
    names = [target.name for target in targets]
    if config.ranks and set(config.ranks) == set(names):
        saved = [tuple(config.ranks[name]) for name in names]
        if all(rank_rules.fits(ranks, weight.shape) for ranks, weight in zip(saved, weights, strict=True)):
            return saved
    if config.budget is None or not weights:
        return [weight.fixed for weight in weights]
    budget = config.budget if isinstance(config.budget, int) else int(config.budget * base_parameters)
    return rank_rules.solve_budget(weights, budget, config.kernel_rank)


def _from_pattern(field_name: str, patterns: dict, targets: list[Target]) -> list:
    """The pattern's value for every weight, None where no pattern matches. PEFT's rule: a name, the end of a name, or a
    regex for either; of a weight or of the layer that has it. A pattern that matches nothing is an error."""
    values, unused = [], set(patterns)
    for target in targets:
        found = None
        for pattern, value in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (target.name, target.module)):
                unused.discard(pattern)
                found = value if found is None else found
        values.append(found)
    if unused and targets:
        raise ValueError(f"{field_name}: {sorted(unused)} match none of the {len(targets)} adapted weights")
    return values
