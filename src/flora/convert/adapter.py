"""The folder of a FLoRA adapter, read and written weight by weight: no model is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flora.files import CONFIG, WEIGHTS, finish_replacing, from_hub, local_path, open_tensors, read_json, save_tensors
from flora.layers.core_space import add_updates, is_finite
from flora.layers.sites import Site
from flora.ranks import parameter_count
from flora.tuner.config import FloraConfig

PREFIX = "base_model.model."
SPACE = ".tucker_space."


@dataclass(frozen=True)
class Update:
    """The update of one weight: ``scale · core ×_1 factors[0] … ×_N factors[N-1]`` (equation 5).

    Args:
        site: which weight of which layer.
        core: (r_1, …, r_N).
        factors: (I_n, r_n) per mode.
        scale: the s of equation 5.
    """

    site: Site
    core: Tensor
    factors: tuple[Tensor, ...]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape (I_1, …, I_N)."""
        return tuple(factor.shape[0] for factor in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """(r_1, …, r_N)."""
        return tuple(self.core.shape)

    @property
    def parameters(self) -> int:
        """Of core and factors together."""
        return parameter_count(self.shape, self.ranks)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of core and factors."""
        return self.core.dtype

    def scaled_space(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
        """The core times the scale, and the factors, in ``dtype``: what computations start from."""
        return self.core.to(dtype) * self.scale, [factor.to(dtype) for factor in self.factors]

    def check_finite(self, source: str) -> None:
        """Raise ValueError, naming ``source``, layer and shape, unless the update is finite."""
        if not is_finite(*self.scaled_space(torch.promote_types(self.dtype, torch.float32))):
            raise ValueError(
                f"{source}: layer {self.site.name!r}, shape {list(self.shape)}, {self.dtype}: its update is not finite"
            )

    def merged_into(self, weight: Tensor) -> Tensor:
        """``weight + update``, (I_1, …, I_N), in the weight's dtype. As in the layer's own merge, the sum is formed in
        float32 at least and rounded once."""
        return add_updates(weight, [self.scaled_space(torch.promote_types(weight.dtype, torch.float32))])


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: its config, the sites of its updates, and its tensors, which are read on demand.

    Args:
        folder: where it lies.
        config: its ``adapter_config.json``.
        sites: one per adapted weight.
        other_keys: the keys of all tensors that are not part of an update: trained heads, biases.
    """

    folder: Path
    config: FloraConfig
    sites: list[Site]
    other_keys: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, source: str | Path) -> Adapter:
        """Open an adapter by its folder or its name on the hub. Only headers are read.

        Raises:
            ValueError: naming file, key and shape, if it is not a whole FLoRA adapter.
        """
        folder = adapter_folder(source)
        finish_replacing(folder)
        path = folder / CONFIG
        read_config(folder, "FLORA")
        config = FloraConfig.from_pretrained(str(folder))
        if not config.weights:
            raise ValueError(
                f"{path} does not list the kinds of the adapted layers ('weights' is empty): load the adapter onto its "
                "model with this version of flora and save it again"
            )
        try:
            sites = [Site.from_dict(name, facts) for name, facts in config.weights.items()]
        except ValueError as error:
            raise ValueError(f"{path}: 'weights' was not written by flora, or is corrupt: {error}") from None
        if config.saved_shapes is None:
            raise ValueError(f"{folder} has no {WEIGHTS}")
        for site in sites:
            _check_shapes(folder / WEIGHTS, site, config.saved_shapes)
        stems = {site.stem for site in sites}
        if strange := [key for key in config.saved_shapes if key.partition(SPACE)[0] not in stems]:
            raise ValueError(f"{folder / WEIGHTS} has {strange[0]!r}, which 'weights' in {path} does not list")
        with open_tensors(folder / WEIGHTS) as file:
            other_keys = [key for key in file.keys() if SPACE not in key]
        return cls(folder, config, sites, other_keys)

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape (I_1, …, I_N) of a site's weight, from the file's header."""
        shapes = self.config.saved_shapes or {}
        modes = range(len(shapes[f"{site.stem}{SPACE}core"]))
        return tuple(shapes[f"{site.stem}{SPACE}factor_{n}"][0] for n in modes)

    def updates(self) -> Iterator[Update]:
        """The updates in the order of ``sites``, each read when it is needed.

        Raises:
            ValueError: naming file, layer and shape, if an update is not finite.
        """
        with open_tensors(self.folder / WEIGHTS) as file:
            keys = {key.removeprefix(PREFIX): key for key in file.keys()}

            def read(stem: str, name: str) -> Tensor:
                return file.get_tensor(keys[f"{stem}{SPACE}{name}"])

            for site in self.sites:
                core = read(site.stem, "core")
                factors = tuple(read(site.stem, f"factor_{n}") for n in range(core.ndim))
                update = Update(site, core, factors, read(site.stem, "scale").item())
                update.check_finite(str(self.folder / WEIGHTS))
                yield update

    def other_tensors(self) -> dict[str, Tensor]:
        """The tensors that are not part of an update, by key. Raises ValueError if one is not finite."""
        with open_tensors(self.folder / WEIGHTS) as file:
            return finite(str(self.folder / WEIGHTS), {key: file.get_tensor(key) for key in self.other_keys})


def _check_shapes(file: Path, site: Site, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the file has core, factors and scale of a site, of shapes that belong together."""

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
        factor = shape(f"factor_{n}", 2)
        if factor[1] != rank:
            raise ValueError(
                f"{file}: '{site.stem}{SPACE}factor_{n}' has shape {list(factor)}; the core of shape {list(ranks)} "
                f"needs {rank} columns"
            )


def finite(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors themselves. Raises ValueError, naming ``source``, key and shape, if one is not finite."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {key!r}, shape {list(tensor.shape)}, is not finite in {tensor.dtype}")
    return tensors


def progress_bar(items: Iterable, total: int, label: str, show: bool) -> Iterable:
    """The items, with a progress bar if ``show``, on a terminal."""
    return tqdm(items, total=total, desc=label, disable=None if show else True, leave=False)


def adapter_folder(source: str | Path) -> Path:
    """The folder of an adapter that is given by its path or by its name on the hub.

    Raises:
        ValueError: if there is none.
    """
    return local_path(source) or from_hub(str(source), ["adapter_*"])


def read_config(folder: Path, *peft_types: str) -> dict[str, Any]:
    """The ``adapter_config.json`` of a PEFT adapter.

    Raises:
        ValueError: if there is no adapter in ``folder``, or one of another type than ``peft_types``.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} is a file; an adapter's folder is needed"
            if folder.is_file()
            else f"{folder} has no adapter in it: there is no {CONFIG}"
        )
    content = read_json(path)
    actual = content.get("peft_type")
    if actual not in peft_types:
        raise ValueError(f"{path} has peft_type {actual!r}; {' or '.join(map(repr, peft_types))} is needed")
    return content


def write_adapter(
    folder: Path, config: FloraConfig, updates: Iterable[Update], others: dict[str, Tensor] | None = None
) -> None:
    """Write an adapter for ``PeftModel.from_pretrained``. Ranks, scales and sites of the updates go into the config.

    Args:
        others: tensors that are not part of an update, by key.

    Raises:
        ValueError: naming the layer or key, if an update or another tensor is not finite.
    """
    tensors, ranks, scales, weights = finite("the adapter", dict(others or {})), {}, {}, {}
    for update in updates:
        update.check_finite("the adapter")
        stem = f"{PREFIX}{update.site.stem}{SPACE}"
        tensors[f"{stem}core"] = update.core.contiguous()
        tensors |= {f"{stem}factor_{n}": factor.contiguous() for n, factor in enumerate(update.factors)}
        tensors[f"{stem}scale"] = torch.tensor(update.scale, dtype=torch.float64)
        ranks[update.site.name] = list(update.ranks)
        scales[update.site.name] = update.scale
        weights[update.site.name] = update.site.to_dict()
    config.ranks, config.scales, config.weights = ranks, scales, weights
    config.stack = None  # every update has factors of its own
    config.save_pretrained(str(folder))
    save_tensors(folder / WEIGHTS, tensors)


def summary(updates: Sequence[Update]) -> str:
    """Numbers of weights and parameters, for the line that a command prints."""
    return f"{len(updates)} weights, {sum(update.parameters for update in updates):,} parameters"
