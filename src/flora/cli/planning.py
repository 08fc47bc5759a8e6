"""`flora plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import click

from flora.keys import (
    KeyedCommand,
    Refused,
    as_overrides,
    described_keys,
    flags,
    parse_override,
    pattern_limit,
    set_nested,
    time_limit,
)
from flora.text import did_you_mean

BUILD_SECONDS = 300.0  # far above what any model takes: only a hostile config reaches it


def plan_keys() -> Iterator[tuple[str, str]]:
    """The fields of FloraConfig but PEFT's own, with their help."""
    from flora.fields import FloraFields

    return described_keys(FloraFields)


@click.command(cls=KeyedCommand, keys=plan_keys)
@click.argument("model")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def plan(model: str, overrides: tuple[str, ...]) -> None:
    """List the weights that an adapter would train.

    The table has their shapes, ranks and numbers of parameters. MODEL is a transformers or diffusers model: a folder
    with its config.json, a name on the hub, or timm/NAME. No weights are loaded. Keys are the fields of FloraConfig:
    `flora plan MODEL budget=0.005`.
    """
    pairs = [parse_override(override) for override in as_overrides(overrides, plan_flags)]

    from flora.models import empty_model, quiet

    quiet()
    import flora
    from flora.tuner.config import OTHER_NAMES

    keys: dict[str, Any] = {"target_modules": "all-weights"}
    known = [field.name for field in dataclasses.fields(flora.FloraConfig)]
    for key, value in pairs:
        if (name := key.partition(".")[0]) not in known:
            hint = did_you_mean(name, known, OTHER_NAMES)
            raise Refused(f"{key}: no field of FloraConfig; `flora plan --help` lists them{hint}")
        set_nested(keys, key, value)
    try:
        config = flora.FloraConfig(**keys)
        with time_limit(BUILD_SECONDS, f"{model}: building this model takes too long"):
            base = empty_model(model)
        with pattern_limit():
            made = flora.plan(base, config)
    except (TypeError, ValueError) as error:
        raise Refused(" ".join(str(error).split())) from error
    click.echo(str(made))


def plan_flags() -> Iterator[str]:
    """The fields of FloraConfig that are true or false."""
    from flora.fields import FloraFields

    return flags(FloraFields)
