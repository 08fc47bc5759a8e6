"""Plans: which weights an adapter adapts, at which ranks and cost. The tuner wraps exactly these weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

from torch import nn

from flora import ranks as rank_rules
from flora.layers import kinds
from flora.layers.kinds import RAW
from flora.layers.sites import Site
from flora.layers.weights.storage import logical_shape, storage_of, tensor_of
from flora.ranks import Ranks
from flora.text import sizes, table
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from flora.tuner.planning.left_out import check_names, left_out
from flora.tuner.planning.targets import Target, default_targets, find_targets, refuse_clashes
from flora.tuner.planning.values import fixed_ranks, ranks_of, scales_of, stacks_of


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
        factors_of: the name of the weight that has the factors, if this one shares those of its stack.
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
    factors_of: str = ""

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
        """Trainable parameters of the core space, without those that it shares with an earlier weight."""
        return prod(self.ranks) if self.factors_of else rank_rules.parameter_count(self.shape, self.ranks)


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

    @property
    def summary(self) -> str:
        """One line: numbers of weights and of trainable parameters, and their share of the model's."""
        return (
            f"{len(self.rows)} weights, {self.total:,} trainable parameters, "
            f"{100 * self.share:.3g} % of the model's {self.base_parameters:,}"
        )

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "ranks", "parameters", "execution")
        rows = [
            (r.name, r.layer_type, sizes(r.shape), sizes(r.ranks), f"{r.parameters:,}", r.execution) for r in self.rows
        ]
        left_out = [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([table(head, rows, right=["parameters"]), "", *left_out, self.summary])


def plan(model: nn.Module, config: FloraConfig) -> Plan:
    """The weights that ``get_peft_model(model, config)`` would adapt. The model stays as it is; it may be on the meta
    device.

    Raises:
        ValueError: naming layer, shape, value given and what is accepted.
    """
    if config.target_modules is None and not config.target_parameters:
        config = replace(config, target_modules=default_targets(model, config))
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
    scales = scales_of(config, targets, sites)
    weights = fixed_ranks(config, targets, sites, shapes)
    stacks = stacks_of(config, targets, sites, weights)
    ranks = ranks_of(config, sites, weights, stacks, base_parameters)
    owners = {sites[n].name: sites[own[0]].name for own in stacks for n in own[1:] if ranks[n] == ranks[own[0]]}
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
            factors_of=owners.get(site.name, ""),
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
