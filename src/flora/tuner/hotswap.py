"""Put another adapter's numbers into one that is there, in place: nothing is wrapped again, nothing recompiles."""

from __future__ import annotations

import os

import torch
from peft import PeftConfig
from torch import nn

from flora.tuner.layer import FloraLayer
from flora.tuner.peft_compat import load_peft_weights


@torch.no_grad()
def hotswap(model: nn.Module, path: str | os.PathLike, adapter: str = "default") -> None:
    """Replace the adapter's numbers by those saved at ``path`` (a folder or a name on the hub).

    The saved ranks may be smaller than the adapter's: core and factors are filled up with zeros, which is exact.

    Raises:
        ValueError: other layers, other shapes or larger ranks, a merged adapter, or a file that is not a FLoRA
            adapter. The model is left as it was.
    """
    PeftConfig.from_pretrained(str(path))  # checks the kind and the format
    saved = load_peft_weights(str(path), device="cpu")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FloraLayer) and adapter in m.tucker_space}
    if not layers:
        raise ValueError(f"the model has no FLoRA adapter {adapter!r} to swap")
    saved = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    targets: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"layer {name!r}: unmerge before swapping adapter {adapter!r}")
        for key, tensor in layer.space(adapter).state_dict(keep_vars=True).items():
            targets[f"{name.removeprefix('base_model.model.')}.tucker_space.{key}"] = tensor
    if set(targets) != set(saved):
        extra, missing = sorted(set(saved) - set(targets)), sorted(set(targets) - set(saved))
        raise ValueError(
            f"{path} has other layers than adapter {adapter!r}: only in the file {extra[:3]}, only in the model "
            f"{missing[:3]}"
        )
    for key, target in targets.items():
        source, is_factor = saved[key], ".factor_" in key
        fits = source.ndim == target.ndim and all(a <= b for a, b in zip(source.shape, target.shape, strict=True))
        if not fits or (is_factor and source.shape[0] != target.shape[0]):
            raise ValueError(f"{key}: shape {list(source.shape)} in {path} does not fit into {list(target.shape)}")
    for key, target in targets.items():
        source = saved[key]
        target.zero_()
        target[tuple(slice(size) for size in source.shape)] = source.to(target.device, target.dtype)
