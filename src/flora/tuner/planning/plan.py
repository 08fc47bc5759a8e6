"""Plans: which weights an adapter adapts, at which ranks and cost. The tuner wraps exactly these weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import nn

from flora import ranks as rank_rules
from flora.layers import kinds
from flora.layers.kinds import RAW
from flora.layers.sites import Site
from flora.layers.weights.storage import logical_shape, storage_of, tensor_of
from flora.ranks import Ranks
from flora.text import sizes, table
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import TARGET_MODULES, AuxiliaryTrainingWrapper, BaseTunerLayer
from flora.tuner.planning.left_out import check_names, left_out
from flora.tuner.planning.targets import Target, find_targets, refuse_clashes


@dataclass(frozen=True)
class PlannedWeight:
    """One weight to adapt.

    Args:
        site: which weight of which layer.
        target: the entry of ``target_modules``, or of ``target_parameters`` if ``raw``, that names it.
        layer_type: the layer's class, "parameter" for a raw parameter.
        shape, ranks: (I_1, …, I_N) and (r_1, …, r_N).
        scale: the s of equation 5, or "auto".
        execution: "auto", "factored" or "merged", as the layer allows.
        shared: whether other modules hold this weight too.
        aliases: further names of the layer.
    """

    site: Site
    target: str
    raw: bool
    layer_type: str
    shape: tuple[int, ...]
    ranks: Ranks
    scale: float | str
    execution: str
    shared: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The layer's name, followed by the weight's unless that is plainly "weight"."""
        return self.site.name

    @property
    def module(self) -> str:
        """The layer's name."""
        return self.site.module

    @property
    def parameter(self) -> str:
        """The weight's name in the layer."""
        return self.site.parameter

    @property
    def parameters(self) -> int:
        """Trainable parameters of the core space."""
        return rank_rules.parameter_count(self.shape, self.ranks)


@dataclass(frozen=True)
class Plan:
    """The weights to adapt, one row each, and the base model's number of parameters. ``str()`` is the table.

    ``scales`` are the numbers that the scales of an adapter's weights came to, by name, once there is an adapter.
    ``left_out`` names the weights that the config means and that are not adapted, and says why.
    """

    rows: list[PlannedWeight] = field(default_factory=list)
    base_parameters: int = 0
    scales: dict[str, float] = field(default_factory=dict, compare=False)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Trainable parameters of all core spaces together."""
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float:
        """``total`` as a share of the base model's parameters."""
        return self.total / self.base_parameters if self.base_parameters else 0.0

    def rows_of(self, module: str) -> list[PlannedWeight]:
        """The weights of one module."""
        return [row for row in self.rows if row.module == module]

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "ranks", "parameters", "execution")
        rows = [
            (r.name, r.layer_type, sizes(r.shape), sizes(r.ranks), f"{r.parameters:,}", r.execution) for r in self.rows
        ]
        total = (
            f"{len(self.rows)} weights, {self.total:,} trainable parameters, "
            f"{100 * self.share:.3g} % of the model's {self.base_parameters:,}"
        )
        left_out = [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([table(head, rows, right=["parameters"]), "", *left_out, total])


def plan(model: nn.Module, config: FloraConfig) -> Plan:
    """The weights that ``get_peft_model(model, config)`` would adapt. The model stays as it is; it may be on the meta
    device.

    Raises:
        ValueError: naming layer, shape, value given and what is accepted.
    """
    if config.target_modules is None and not config.target_parameters:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        config = replace(config, target_modules=TARGET_MODULES.get(model_type))
    made = make_plan(model, config)
    if not made.rows:
        raise ValueError(
            f"no layer matches target_modules={config.target_modules!r}, target_parameters={config.target_parameters!r}"
        )
    return made


def make_plan(model: nn.Module, config: FloraConfig, keys: Iterable[str] | None = None) -> Plan:
    """As ``plan``, but empty if nothing matches. ``keys`` names the layers in place of the config."""
    targets, without = find_targets(model, config, keys), {}
    if keys is None and targets:
        if config.saved_shapes is None:  # else the file is checked, weight by weight
            check_names(model, config)
        without = left_out(model, config, targets)
        targets = [target for target in targets if target.name not in without]
    refuse_clashes(model, targets)
    sites, shapes = _sites(targets)
    base_parameters = count_base_parameters(model)
    scales = _scales(config, targets, sites)
    ranks = _ranks(config, targets, sites, shapes, base_parameters)
    rows = [
        PlannedWeight(
            site=site,
            target=target.entry,
            raw=target.raw,
            layer_type=site.kind.name if site.kind is RAW else type(target.layer).__name__,
            shape=shape,
            ranks=own_ranks,
            scale=scale,
            execution=kinds.possible(config.execution, site.kind, target.layer, target.parameter, shape),
            shared=target.shared,
            aliases=target.aliases,
        )
        for target, site, shape, own_ranks, scale in zip(targets, sites, shapes, ranks, scales, strict=True)
    ]
    return Plan(rows, base_parameters, left_out=without)


def _sites(targets: list[Target]) -> tuple[list[Site], list[tuple[int, ...]]]:
    """Site and shape of every target."""
    sites, shapes = [], []
    for target, path in zip(targets, _paths(targets), strict=True):
        try:
            kind, shape = kinds.describe(target.layer, target.parameter)
        except ValueError as error:
            raise ValueError(f"layer {target.module!r} ({type(target.layer).__name__}): {error}") from None
        sites.append(Site.of(target.layer, kind, target.module, target.parameter, path))
        shapes.append(shape)
    return sites, shapes


def _paths(targets: list[Target]) -> list[str]:
    """The module name of each target's wrapper in the adapted model. Every weight has a wrapper of its own around its
    module. Raw parameters are wrapped last, and within either group the first is outermost."""
    order: dict[str, list[str]] = {}
    for target in sorted(targets, key=lambda target: not target.raw):
        order.setdefault(target.module, []).append(target.name)

    def path(target: Target) -> str:
        parts = target.module.split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts))]
        depths = [len(order.get(module, ())) for module in modules[:-1]] + [order[target.module].index(target.name)]
        return ".".join(part + ".base_layer" * depth for part, depth in zip(parts, depths, strict=True))

    return [path(target) for target in targets]


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
    for module in model.modules():
        if storage_of(module, "weight") is not None:  # several numbers may share a byte
            sizes[id(tensor_of(module, "weight"))] = prod(logical_shape(module, "weight"))
    return sum(sizes.values())


def _ranks(
    config: FloraConfig, targets: list[Target], sites: list[Site], shapes: list[tuple[int, ...]], base_parameters: int
) -> list[Ranks]:
    """Ranks of every target: those of the file that is being loaded, else those that the config lists, else those that
    its patterns, ``r`` or budget come to."""
    fixed = _fixed_ranks(config, targets, sites, shapes)
    for given in (_file_ranks(config, sites), _listed_ranks(config, sites)):
        if given and all(rank_rules.fits(ranks, shape) for ranks, shape in zip(given, shapes, strict=True)):
            return given
    if config.budget is None or not targets:
        return [weight.fixed for weight in fixed if weight.fixed]
    budget = config.budget if isinstance(config.budget, int) else int(config.budget * base_parameters)
    return rank_rules.solve_budget(fixed, budget, config.kernel_rank)


def _file_ranks(config: FloraConfig, sites: list[Site]) -> list[Ranks] | None:
    keys = [f"{site.stem}.tucker_space.core" for site in sites]
    shapes = config.saved_shapes
    return [shapes[key] for key in keys] if shapes and all(key in shapes for key in keys) else None


def _listed_ranks(config: FloraConfig, sites: list[Site]) -> list[Ranks] | None:
    names = [site.name for site in sites]
    return [tuple(config.ranks[name]) for name in names] if config.ranks and set(config.ranks) == set(names) else None


def _scales(config: FloraConfig, targets: list[Target], sites: list[Site]) -> list[float | str]:
    """Scale of every target: the one that the config lists, else the one that its patterns or ``scale`` come to."""
    patterns = _from_pattern("scale_pattern", config.scale_pattern, targets)
    names = [site.name for site in sites]
    if config.scales and set(config.scales) == set(names):
        return [config.scales[name] for name in names]
    return [config.scale if scale is None else scale for scale in patterns]


def _fixed_ranks(
    config: FloraConfig, targets: list[Target], sites: list[Site], shapes: list[tuple[int, ...]]
) -> list[rank_rules.Weight]:
    """The weights with the ranks that patterns or ``r`` fix; None for those that the budget decides."""
    weights = []
    patterns = _from_pattern("rank_pattern", config.rank_pattern, targets)
    for target, site, shape, pattern in zip(targets, sites, shapes, patterns, strict=True):
        weight = rank_rules.Weight(shape, site.kind.roles_of(shape))
        r = config.r if pattern is None else pattern
        try:
            fixed = None if r is None else rank_rules.clip_ranks(weight, r, config.kernel_rank)
        except ValueError as error:
            raise ValueError(f"layer {target.name!r}: {error}") from None
        weights.append(rank_rules.Weight(weight.shape, weight.roles, fixed))
    return weights


def _from_pattern(field_name: str, patterns: dict[str, Any] | None, targets: list[Target]) -> list:
    """The pattern's value for every weight, None if no pattern matches. By PEFT's rule a pattern is a name, the end of
    one, or a regex for either, of a weight or of its layer. A pattern that matches nothing is an error."""
    patterns = patterns or {}
    values, unused = [], set(patterns)
    for target in targets:
        own = None
        for pattern, value in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (target.name, target.module)):
                unused.discard(pattern)
                own = value if own is None else own
        values.append(own)
    if unused and targets:
        raise ValueError(f"{field_name}: {sorted(unused)} match none of the {len(targets)} adapted weights")
    return values
