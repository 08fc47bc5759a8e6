"""Both sides of a conversion on one model: how far apart their outputs are."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flora.convert.checkpoint import Checkpoint
from flora.convert.diffusers import FILE
from flora.convert.official import layers_of, whole_layer
from flora.files import local_path, open_tensors
from flora.models import example_inputs, load_model


@dataclass(frozen=True)
class OutputDifference:
    """Absolute values of two sides' outputs for the same random inputs.

    Args:
        largest: the largest difference between the sides.
        output: the largest output.
        effect: the largest change that the adapter makes to the base model's outputs.
    """

    largest: float
    output: float
    effect: float

    def __str__(self) -> str:
        return (
            f"verified: outputs differ by at most {self.largest:.1e} "
            f"(they are up to {self.output:.3g}, and the adapter changes them by up to {self.effect:.3g})"
        )


def verify(model: str, adapter: str | Path, other: str | Path, form: str, **options: Any) -> OutputDifference:
    """Compare the outputs of a FLoRA adapter with those of what it was converted to or from.

    Args:
        model: the base model, a folder or a name on the hub.
        adapter: the FLoRA side.
        other: the other side, a folder or file.
        form: the format of ``other``, a key of ``FORMS``.
        options: what loading ``other`` takes besides its path: scale, prefix and save for "official".

    Raises:
        ValueError: if one side cannot be loaded, or example inputs of the model are not known.
    """
    base = load_model(model)
    inputs = example_inputs(base)
    plain = _outputs(base, inputs)
    ours = _outputs(PeftModel.from_pretrained(copy.deepcopy(base), _name(adapter)).eval(), inputs)
    theirs = _outputs(FORMS[form](base, _name(other), **options).eval(), inputs)
    largest = max(tensor.abs().max().item() for tensor in ours)
    return OutputDifference(_distance(ours, theirs), largest, _distance(ours, plain))


def _name(source: str | Path) -> str:
    """A path with ``~`` expanded, or a name on the hub."""
    return str(local_path(source) or source)


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(tuple(_plain(model(**inputs))))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _plain(output: Any) -> tuple:
    return output.to_tuple() if hasattr(output, "to_tuple") else (output,)


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(some, others, strict=True))


def _merged(model: nn.Module, path: str) -> nn.Module:
    return load_model(path)


def _locon(model: nn.Module, path: str) -> nn.Module:
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    with open_tensors(Path(path)) as file:
        names = {key.partition(".")[0] for key in file.keys()}
    before, LycorisNetwork.LORA_PREFIX = LycorisNetwork.LORA_PREFIX, _prefix_of(model, names, path)
    try:
        network, _ = create_lycoris_from_weights(1.0, path, model)
    finally:
        LycorisNetwork.LORA_PREFIX = before
    network.merge_to()
    return model


def _prefix_of(model: nn.Module, names: set[str], path: str) -> str:
    """The prefix that most of the model's layers have in the file, which may hold layers of other models too."""
    ends = [f"_{module}".replace(".", "_") for module, _ in model.named_modules() if module]
    counts = Counter(name.removesuffix(end) for name in names for end in ends if name.endswith(end))
    if not counts:
        raise ValueError(f"{path} has no layer of a {type(model).__name__}")
    return min(counts, key=lambda prefix: (-counts[prefix], len(prefix)))


def _diffusers(model: nn.Module, path: str) -> nn.Module:
    if not hasattr(model, "load_lora_adapter"):
        raise ValueError(f"{type(model).__name__} has no load_lora_adapter; give a model of diffusers")
    modules = {name for name, _ in model.named_modules()}
    with open_tensors(Path(path) / FILE) as file:
        names = [key.removesuffix(".lora_A.weight").partition(".") for key in file.keys()]
    component = next((component for component, _, module in names if module in modules), None)
    if component is None:
        raise ValueError(f"{path} has no layer of a {type(model).__name__}")
    load: Any = model.load_lora_adapter
    load(path, prefix=component, use_safetensors=True)
    return model


@torch.no_grad()
def _official(model: nn.Module, path: str, scale: float, prefix: str | None, save: Sequence[str]) -> nn.Module:
    """The authors' own computation: each factor in turn multiplies the core's first mode; then the first two modes are
    swapped."""
    source = Checkpoint.open(path)
    prefix, cores = layers_of(source, prefix)
    for key, module in cores.items():
        delta = source.tensor(key)
        for n in range(delta.ndim):
            delta = torch.tensordot(delta, source.tensor(key.removesuffix("G") + str(n)), dims=([0], [1]))
        model.get_parameter(f"{module}.weight").add_(scale * delta.transpose(0, 1))
    for module in save:
        tensors = {name.removeprefix(f"{module}."): t for name, t in whole_layer(source, prefix, module)}
        model.get_submodule(module).load_state_dict(tensors)
    return model


FORMS: dict[str, Callable[..., nn.Module]] = {
    "lora": PeftModel.from_pretrained,
    "flora": PeftModel.from_pretrained,
    "merged": _merged,
    "locon": _locon,
    "diffusers": _diffusers,
    "official": _official,
}
