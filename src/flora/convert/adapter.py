"""A FLoRA adapter's folder, read and written weight by weight: no model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from flora.files import WEIGHTS, from_hub, local_path, open_tensors
from flora.layers.sites import Site
from flora.ranks import parameter_count
from flora.tuner.config import FloraConfig

PREFIX = "base_model.model."
SPACE = ".tucker_space."


@dataclass(frozen=True)
class Update:
    """One weight's update, ``scale · core ×_1 factors[0] …`` with core (r_1, …, r_N) and factors[n] (I_n, r_n)."""

    site: Site
    core: Tensor
    factors: tuple[Tensor, ...]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(factor.shape[0] for factor in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.core.shape)

    @property
    def parameters(self) -> int:
        return parameter_count(self.shape, self.ranks)

    @property
    def dtype(self) -> torch.dtype:
        return self.core.dtype

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The core, scale in it, and the factors in float64, for what is computed with them."""
        return self.core.double() * self.scale, [factor.double() for factor in self.factors]


@dataclass(frozen=True)
class Adapter:
    """What is in the folder: the config, where the updates act, and their tensors, each read when it is asked for.

    Raises:
        ValueError: naming file, key and shape, where it is no whole FLoRA adapter.
    """

    folder: Path
    config: FloraConfig
    sites: list[Site]
    rest: list[str] = field(default_factory=list)  # keys of all that is no update: trained heads, biases

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        folder = adapter_folder(folder)
        read_config(folder, "FLORA")
        config = FloraConfig.from_pretrained(str(folder))
        if not config.weights:
            raise ValueError(
                f"{folder / 'adapter_config.json'} does not say which kinds of layers it adapts ('weights' is empty): "
                "load the adapter onto its model with this version of flora and save it again"
            )
        try:
            sites = [Site.from_dict(name, facts) for name, facts in config.weights.items()]
        except (AttributeError, TypeError, ValueError) as error:
            path = folder / "adapter_config.json"
            raise ValueError(f"{path}: 'weights' is not as flora writes it: {error}") from None
        if config.saved_shapes is None:
            raise ValueError(f"{folder} has no {WEIGHTS}")
        for site in sites:
            _check_shapes(folder / WEIGHTS, site, config.saved_shapes)
        with open_tensors(folder / WEIGHTS) as file:
            rest = [key for key in file.keys() if SPACE not in key]
        return cls(folder, config, sites, rest)

    def shape(self, site: Site) -> tuple[int, ...]:
        """The weight's; nothing is read for it."""
        shapes = self.config.saved_shapes
        modes = range(len(shapes[f"{site.stem}{SPACE}core"]))
        return tuple(shapes[f"{site.stem}{SPACE}factor_{n}"][0] for n in modes)

    def updates(self) -> Iterator[Update]:
        with open_tensors(self.folder / WEIGHTS) as file:
            keys = {key.removeprefix(PREFIX): key for key in file.keys()}

            def read(stem: str, name: str) -> Tensor:
                return file.get_tensor(keys[f"{stem}{SPACE}{name}"])

            for site in self.sites:
                core = read(site.stem, "core")
                factors = tuple(read(site.stem, f"factor_{n}") for n in range(core.ndim))
                yield Update(site, core, factors, read(site.stem, "scale").item())

    def other_tensors(self) -> dict[str, Tensor]:
        with open_tensors(self.folder / WEIGHTS) as file:
            return {key: file.get_tensor(key) for key in self.rest}


def _check_shapes(file: Path, site: Site, shapes: dict[str, tuple[int, ...]]) -> None:
    def shape(name: str, modes: int | None) -> tuple[int, ...]:
        key = f"{site.stem}{SPACE}{name}"
        if key not in shapes:
            raise ValueError(f"{file}: {key!r} is missing")
        if modes is not None and len(shapes[key]) != modes:
            raise ValueError(f"{file}: {key!r} has shape {list(shapes[key])}; {modes} modes are needed")
        return shapes[key]

    ranks = shape("core", None)
    shape("scale", 0)
    for n, rank in enumerate(ranks):
        found = shape(f"factor_{n}", 2)
        if found[1] != rank:
            raise ValueError(
                f"{file}: '{site.stem}{SPACE}factor_{n}' has shape {list(found)}; the core of shape {list(ranks)} "
                f"needs {rank} columns"
            )


def bar(items: Iterable, total: int, label: str, show: bool) -> Iterable:
    """The items, with a progress bar."""
    return tqdm(items, total=total, desc=label, disable=not show, leave=False)


def adapter_folder(source: str | Path) -> Path:
    """The folder of an adapter that is given by its path or by its name on the hub."""
    return local_path(source) or from_hub(str(source), ["adapter_*"])


def read_config(folder: Path, peft_type: str) -> dict[str, Any]:
    """``adapter_config.json`` of a PEFT adapter of that type."""
    path = folder / "adapter_config.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no adapter's config: {error}") from error
    found = content.get("peft_type") if isinstance(content, dict) else None
    if found != peft_type:
        raise ValueError(f"{path} is of peft_type {found!r}; {peft_type!r} is needed")
    return content


def write_adapter(
    folder: Path, config: FloraConfig, updates: Iterable[Update], rest: dict[str, Tensor] | None = None
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` reads: ranks and sites of the updates go into the config."""
    tensors, ranks, weights = dict(rest or {}), {}, {}
    for update in updates:
        stem = f"{PREFIX}{update.site.stem}{SPACE}"
        tensors[f"{stem}core"] = update.core.contiguous()
        tensors |= {f"{stem}factor_{n}": factor.contiguous() for n, factor in enumerate(update.factors)}
        tensors[f"{stem}scale"] = torch.tensor(update.scale, dtype=torch.float64)
        ranks[update.site.name] = list(update.ranks)
        weights[update.site.name] = update.site.to_dict()
    config.ranks, config.weights = ranks, weights
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def summary(updates: Sequence[Update]) -> str:
    """How much there is, for the line that a command prints."""
    return f"{len(updates)} weights, {sum(update.parameters for update in updates):,} parameters"
