"""Whether an adapter's file is one for this model: asked before any layer is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from flora.layers.sites import Site
from flora.tuner.config import FloraConfig
from flora.tuner.planning.plan import Plan, PlannedWeight


def check_saved(made: Plan, config: FloraConfig) -> None:
    """Raise ValueError unless the adapter that is being loaded has exactly the core spaces of the plan."""
    # PEFT saves a layer under each of its names
    again = tuple(
        f"{alias}{row.site.stem.removeprefix(row.module)}.tucker" for row in made.rows for alias in row.aliases
    )
    saved = {key: shape for key, shape in (config.saved_shapes or {}).items() if not key.startswith(again)}
    check_modes([(row.site, row.shape) for row in made.rows], config.weights or {})
    expected: dict[str, tuple[tuple[int, ...], PlannedWeight]] = {}
    for row in made.rows:
        stem = f"{row.site.stem}.tucker_space."
        expected[stem + "core"] = (row.ranks, row)
        expected |= {f"{stem}factor_{n}": (pair, row) for n, pair in enumerate(zip(row.shape, row.ranks, strict=True))}
        expected[stem + "scale"] = ((), row)
    if not expected.keys() & saved.keys():  # PEFT renames the modules of older base models
        needed = Counter((key.rpartition(".")[2], shape) for key, (shape, _) in expected.items())
        if needed == Counter((key.rpartition(".")[2], shape) for key, shape in saved.items()):
            return
    for key, (shape, row) in expected.items():
        if saved.get(key) != shape:
            present = list(saved[key]) if key in saved else "nothing"
            raise ValueError(
                f"layer {row.name!r}: the adapter's file has {present} for {key.rpartition('.')[2]}, but a weight of "
                f"shape {list(row.shape)} at ranks {list(row.ranks)} needs {list(shape)}; was it trained on another "
                "base model?"
            )
    if extra := sorted(key for key in saved if key not in expected):
        raise ValueError(
            f"unexpected key {extra[0]!r} in the adapter's file: this base model has no such adapted weight"
        )


def check_modes(sites: Iterable[tuple[Site, tuple[int, ...]]], weights: dict[str, Any]) -> None:
    """Raise ValueError if the modes of a weight are in another order than the adapter's config says. Where sizes are
    equal no shape tells it, and ``import lora`` may have guessed it.

    Args:
        sites: the model's, with the weights' shapes.
        weights: of the adapter's config.
    """
    for own, shape in sites:
        if facts := weights.get(own.name):
            site = Site.from_dict(own.name, facts)
            theirs, ours = (f"{one.modes(shape)} at {one.stem!r}" for one in (site, own))
            if theirs != ours:
                raise ValueError(
                    f"layer {own.name!r}, shape {list(shape)}: the adapter is for {theirs}, the model has {ours}; "
                    "was it trained on another base model, or imported without base=?"
                )
