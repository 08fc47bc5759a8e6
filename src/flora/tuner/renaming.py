"""``key_mapping`` of PEFT's ``from_pretrained``: other names for the layers of an adapter's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flora.layers.sites import Site


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """By PEFT's rule: the first pattern that is found replaces."""
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def rename(config: Any, mapping: Mapping[str, str]) -> None:
    """Give every name in a saved ``FloraConfig`` its new form, in place."""
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(names := getattr(config, field), set):
            setattr(config, field, {renamed(name, mapping) for name in names})
    for field in ("rank_pattern", "scale_pattern", "ranks", "scales", "saved_shapes"):
        if values := getattr(config, field):
            setattr(config, field, {renamed(name, mapping): value for name, value in values.items()})
    if config.weights:
        sites = [Site.from_dict(name, facts) for name, facts in config.weights.items()]
        sites = [replace(s, module=renamed(s.module, mapping), path=renamed(s.path, mapping)) for s in sites]
        config.weights = {site.name: site.to_dict() for site in sites}
