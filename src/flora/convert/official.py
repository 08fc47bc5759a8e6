"""From the authors' own checkpoints: ``….flora_layer.param_G``, and ``param_0``, ``param_1`` …, with the modes in the
order in, out, kernel. The scale is not in the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flora.convert.adapter import PREFIX, Update, progress_bar, summary, write_adapter
from flora.convert.checkpoint import Checkpoint
from flora.files import new_folder
from flora.layers.kinds import CONV, LINEAR
from flora.layers.sites import Site
from flora.tuner.config import FloraConfig

CORE = ".flora_layer.param_G"
KIND_BY_MODES = {2: LINEAR, 4: CONV, 5: CONV}


def import_official(
    checkpoint: str | Path,
    out: str | Path,
    *,
    scale: float,
    prefix: str | None = None,
    save: Sequence[str] = (),
    progress: bool = False,
) -> str:
    """Write a checkpoint of the authors' code (equation 5) as a FLoRA adapter of the same model.

    Args:
        checkpoint: a state dict, .safetensors or a .pt / .pth / .bin that holds only tensors.
        out: a new folder.
        scale: the s that it was trained with (in the authors' configs 0.04, 0.4 or 4), which the file does not tell.
        prefix: what precedes the model's own names in the checkpoint. By default "model." (the authors' wrapper) if
            all names have it, else "".
        save: names of layers that were trained whole, such as a new head. They are copied.
        progress: show a progress bar.

    Returns:
        a line that describes the adapter.

    Raises:
        ValueError: naming file, key and shape, if it is not such a checkpoint.
        FileExistsError: if ``out`` exists.
    """
    source = Checkpoint.open(checkpoint)
    prefix, cores = layers_of(source, prefix)
    steps = progress_bar(cores.items(), len(cores), "import", progress)
    updates = [_update(source, key, module, scale) for key, module in steps]
    others = {f"{PREFIX}{name}": tensor for module in save for name, tensor in whole_layer(source, prefix, module)}
    config = FloraConfig(
        r=1,
        scale=scale,
        init="official",
        target_modules=[update.site.module for update in updates],
        modules_to_save=list(save) or None,
    )
    with new_folder(out) as folder:
        write_adapter(folder, config, updates, others)
    return f"{out}: {summary(updates)}"


def layers_of(source: Checkpoint, prefix: str | None) -> tuple[str, dict[str, str]]:
    """The prefix (detected if None), and the module of every core by the core's key.

    Raises:
        ValueError: if there is no core, or a core without the prefix.
    """
    keys = source.keys()
    cores = [key for key in keys if key.endswith(CORE)]
    if not cores:
        raise ValueError(f"{source.source} has no key that ends in {CORE!r} (its first key: {keys[0]!r})")
    if prefix is None:
        prefix = "model." if all(key.startswith("model.") for key in keys) else ""
    if strange := [key for key in cores if not key.startswith(prefix)]:
        raise ValueError(f"{source.source}: {strange[0]!r} does not begin with {prefix!r}")
    return prefix, {key: key.removeprefix(prefix).removesuffix(CORE) for key in cores}


def _update(source: Checkpoint, key: str, module: str, scale: float) -> Update:
    core = source.tensor(key)
    if core.ndim not in KIND_BY_MODES:
        raise ValueError(
            f"{source.source}: {key!r} has shape {list(core.shape)}; the authors' layers have 2, 4 or 5 modes"
        )
    factors = [_factor(source, key, n, rank) for n, rank in enumerate(core.shape)]
    factors[:2] = factors[1], factors[0]
    return Update(Site(KIND_BY_MODES[core.ndim], module), core.transpose(0, 1), tuple(factors), scale)


def _factor(source: Checkpoint, core: str, mode: int, rank: int) -> Tensor:
    key = core.removesuffix("G") + str(mode)
    if key not in source:
        raise ValueError(f"{source.source}: {key!r} is missing")
    factor = source.tensor(key)
    if factor.ndim != 2 or factor.shape[1] != rank:
        raise ValueError(f"{source.source}: {key!r} has shape {list(factor.shape)}; (size, {rank}) is needed")
    return factor


def whole_layer(source: Checkpoint, prefix: str, module: str) -> list[tuple[str, Tensor]]:
    """All tensors of a layer in the checkpoint, by their names in the model. Raises ValueError if there are none."""
    own = [key for key in source.keys() if re.match(rf"{re.escape(prefix + module)}\.", key)]
    if not own:
        raise ValueError(f"{source.source} has no tensor of {module!r}")
    return [(key.removeprefix(prefix), source.tensor(key)) for key in own]
