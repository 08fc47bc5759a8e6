"""From a config to the ranks and the scale of every planned weight, and to the weights that share factors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from flora import ranks as rank_rules
from flora.layers.kinds import Kind
from flora.layers.sites import Site
from flora.ranks import Ranks
from flora.tuner.config import FloraConfig
from flora.tuner.planning.targets import Target


def stacks_of(
    config: FloraConfig, targets: list[Target], sites: list[Site], weights: list[rank_rules.Weight]
) -> list[list[int]]:
    """The numbers of the weights that share factors; most often each weight by itself.

    ``stack="layers"`` puts together the weights whose names differ in numbers only, of one kind, shape and rule for the
    ranks. A weight that a start fills in a way of its own, or that other modules hold, stays by itself.
    """
    together: dict[tuple, list[int]] = {}
    for n, (target, site, weight) in enumerate(zip(targets, sites, weights, strict=True)):
        alone = config.stack is None or target.shared or site.kind.after_start is not Kind.after_start
        pattern = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", site.name)
        together.setdefault((n,) if alone else (pattern, site.kind, weight), []).append(n)
    return list(together.values())


def ranks_of(
    config: FloraConfig,
    sites: list[Site],
    weights: list[rank_rules.Weight],
    stacks: list[list[int]],
    base_parameters: int,
) -> list[Ranks]:
    """Ranks of every weight: those of the file that is being loaded, else those that the config lists, else those that
    its patterns, ``r`` or budget come to."""
    for given in (_file_ranks(config, sites), _listed_ranks(config, sites)):
        if given and all(rank_rules.fits(ranks, w.shape) for ranks, w in zip(given, weights, strict=True)):
            return given
    if config.budget is None or not weights:
        return [weight.fixed for weight in weights if weight.fixed]
    budget = config.budget if isinstance(config.budget, int) else int(config.budget * base_parameters)
    solved = rank_rules.solve_budget(
        [replace(weights[own[0]], cores=len(own)) for own in stacks], budget, config.kernel_rank
    )
    return [ranks for _, ranks in sorted((n, ranks) for own, ranks in zip(stacks, solved, strict=True) for n in own)]


def _file_ranks(config: FloraConfig, sites: list[Site]) -> list[Ranks] | None:
    keys = [f"{site.stem}.tucker_space.core" for site in sites]
    shapes = config.saved_shapes
    return [shapes[key] for key in keys] if shapes and all(key in shapes for key in keys) else None


def _listed_ranks(config: FloraConfig, sites: list[Site]) -> list[Ranks] | None:
    names = [site.name for site in sites]
    return [tuple(config.ranks[name]) for name in names] if config.ranks and set(config.ranks) == set(names) else None


def scales_of(config: FloraConfig, targets: list[Target], sites: list[Site]) -> list[float | str]:
    """Scale of every target: the one that the config lists, else the one that its patterns or ``scale`` come to."""
    patterns = _from_pattern("scale_pattern", config.scale_pattern, targets)
    names = [site.name for site in sites]
    if config.scales and set(config.scales) == set(names):
        return [config.scales[name] for name in names]
    return [config.scale if scale is None else scale for scale in patterns]


def fixed_ranks(
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
