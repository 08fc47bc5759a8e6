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
@click.option("--html", metavar="FILE", help="Also draw the plan, on a page of its own in a new FILE.")
def plan(model: str, overrides: tuple[str, ...], html: str | None) -> None:
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

    keys: dict[str, Any] = {}
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
    written = html and write_page(html, drawn(model, made))
    click.echo("\n".join(filter(None, [str(made), written])))


def drawn(model: str, made: Any) -> str:
    """The page of a ``Plan``."""
    from flora.page import Row, page
    from flora.text import sizes

    rows = [
        Row(
            one.name,
            one.layer_type,
            (sizes(one.shape), sizes(one.ranks), f"{one.parameters:,}"),
            one.parameters / made.total,
        )
        for one in made.rows
    ]
    return page(f"{model}: the plan", made.summary, ("shape", "ranks", "parameters"), "share of the budget", rows)


def write_page(path: str, text: str) -> str:
    """Write a page to a new file; the line that says so. Raises Refused if it exists."""
    from flora.files import new_file

    try:
        with new_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(str(error)) from error
    return f"{path}: open it in a browser"


def plan_flags() -> Iterator[str]:
    """The fields of FloraConfig that are true or false."""
    from flora.fields import FloraFields

    return flags(FloraFields)
