"""Put another adapter's numbers into one that is there, in place: nothing is wrapped again, nothing recompiles."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from flora.tuner.config import FloraConfig
from flora.tuner.layer import FloraLayer
from flora.tuner.peft_compat import AuxiliaryTrainingWrapper, load_peft_weights
from flora.tuner.planning.saved import check_modes


@torch.no_grad()
def hotswap(model: nn.Module, path: str | os.PathLike, adapter: str = "default") -> None:
    """Replace the adapter's numbers by those saved at ``path`` (a folder or a name on the hub), its whole modules
    (``modules_to_save``, token rows) included. The model may be compiled.

    The saved ranks may be smaller than the adapter's: core and factors are filled up with zeros, which is exact.

    Raises:
        ValueError: other layers, other shapes or larger ranks, numbers that are not finite, a merged adapter, or a file
            that is not a FLoRA adapter. The model is left as it was.
    """
    config = FloraConfig.from_pretrained(str(path))  # checks kind, format and the file's header
    layers = {_plain(n): m for n, m in model.named_modules() if isinstance(m, FloraLayer) and adapter in m.tucker_space}
    if not layers:
        raise ValueError(f"the model has no FLoRA adapter {adapter!r} to swap")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"layer {name!r}: unmerge before swapping adapter {adapter!r}")
    if any(layer.space(adapter).stack for layer in layers.values()) and config.stack is None:
        raise ValueError(f"adapter {adapter!r} shares factors between layers, and {path} does not")
    check_modes([(layer.site, layer.weight_shape) for layer in layers.values()], config.weights or {})
    saved = {_plain(key): tensor for key, tensor in load_peft_weights(str(path), device="cpu").items()}
    targets = _targets(model, layers, adapter)
    base = {_plain(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    extra, missing = sorted(saved.keys() - targets.keys() - base.keys()), sorted(targets.keys() - saved.keys())
    if extra or missing:
        raise ValueError(
            f"{path} has other layers than adapter {adapter!r}: only in the file {extra[:3]}, only in the model "
            f"{missing[:3]}"
        )
    pairs = {key: (targets[key] if key in targets else base[key], source) for key, source in saved.items()}
    for key, (target, source) in pairs.items():
        _check(key, target, source, path)
    for target, source in pairs.values():
        target.zero_()
        target[tuple(slice(size) for size in source.shape)] = source.to(target.device, target.dtype)
    for layer in layers.values():
        layer.space(adapter).write_down()


def _plain(name: str) -> str:
    """A tensor's or module's name in the base model: neither PEFT's wrapper nor torch.compile's changes it."""
    return name.replace("_orig_mod.", "").removeprefix("base_model.model.")


def _targets(model: nn.Module, layers: dict[str, FloraLayer], adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors by their names in a file."""
    targets = {
        f"{name}.tucker_space.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.space(adapter).state_dict(keep_vars=True).items()
    }
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict(keep_vars=True)
            names = module.adapter_state_dict_load_map(adapter)
            targets |= {f"{_plain(name)}.{key}": state[own] for key, own in names.items() if own in state}
    return targets


def _check(key: str, target: Tensor, source: Tensor, path: str | os.PathLike) -> None:
    """Raise ValueError unless the saved tensor is finite and fits: a core space's may have smaller ranks."""
    fits = source.shape == target.shape
    if ".tucker_space." in key and source.ndim == target.ndim:
        fits = all(a <= b for a, b in zip(source.shape, target.shape, strict=True))
        fits = fits and (".factor_" not in key or source.shape[0] == target.shape[0])
    if not fits:
        raise ValueError(f"{key}: shape {list(source.shape)} in {path} does not fit into {list(target.shape)}")
    if source.is_floating_point() != target.is_floating_point() or source.is_complex():
        raise ValueError(f"{key}: dtype {source.dtype} in {path} does not fit into {target.dtype}")
    if not torch.isfinite(source).all():
        raise ValueError(f"{key}: its numbers in {path} are not finite")
