"""Both sides of a conversion on one model: how far apart their outputs are."""

from __future__ import annotations

import copy
import importlib
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

from flora.convert.adapter import Adapter
from flora.convert.checkpoint import Checkpoint
from flora.convert.diffusers import FILE, component_of
from flora.convert.locon import name_of
from flora.convert.official import layers_of, whole_layer
from flora.convert.sgm import sgm_names
from flora.convert.tensor_files import PIPELINE
from flora.files import local_path, open_tensors
from flora.models import example_inputs, load_model
from flora.tuner.layer import FloraLayer


@dataclass(frozen=True)
class OutputDifference:
    """Absolute values of two sides' outputs for the same random inputs.

    Args:
        largest: the largest difference between the sides.
        output: the largest output.
        effect: the largest change that the adapter makes to the base model's outputs.
        unverified: what the comparison does not cover.
    """

    largest: float
    output: float
    effect: float
    unverified: tuple[str, ...] = ()

    def __str__(self) -> str:
        verified = (
            f"verified: outputs differ by at most {self.largest:.1e} "
            f"(they are up to {self.output:.3g}, and the adapter changes them by up to {self.effect:.3g})"
        )
        return "\n".join([verified, *(f"not verified: {what}" for what in self.unverified)])


def verify(model: str, adapter: str | Path, other: str | Path, form: str, **options: Any) -> OutputDifference:
    """Compare the outputs of a FLoRA adapter with those of what it was converted to or from.

    Args:
        model: the base model, a folder or a name on the hub; of a pipeline the component that the adapter adapts.
        adapter: the FLoRA side.
        other: the other side, a folder or file.
        form: the format of ``other``, a key of ``FORMS``.
        options: what loading ``other`` takes besides its path: scale, prefix and save for "official".

    Raises:
        ValueError: if one side cannot be loaded, or example inputs of the model are not known.
    """
    return Verification(model, form, adapter).compare(adapter, other, **options)


class Verification:
    """A base model that has run once, before anything is converted, so that a mistake shows in time.

    Args:
        model, form: as ``verify``'s.
        adapter: an adapter of the model, by which the component of a pipeline is chosen. Unless it exists already,
            ``model`` must be the component's folder.
        component: the component's name, if the adapter does not tell it.

    Raises:
        ValueError: if the model cannot be loaded or does not run, or the form cannot be loaded onto it.
        ModuleNotFoundError: if a package is missing that the form needs.
    """

    def __init__(self, model: str, form: str, adapter: str | Path | None = None, component: str | None = None) -> None:
        self.form = form
        self.base = load_model(_component_folder(model, adapter, component))
        if form == "locon":
            importlib.import_module("lycoris")
        if form == "diffusers" and not hasattr(self.base, "load_lora_adapter"):
            raise ValueError(f"{type(self.base).__name__} has no load_lora_adapter; give a model of diffusers")
        self.inputs = example_inputs(self.base)
        try:
            self.plain = _outputs(self.base, self.inputs)
        except Exception as error:  # a model's own code may raise anything
            raise ValueError(f"{model}: it does not run on {', '.join(self.inputs)}: {error}") from error

    def compare(self, adapter: str | Path, other: str | Path, **options: Any) -> OutputDifference:
        """As ``verify``."""
        ours: Any = PeftModel.from_pretrained(copy.deepcopy(self.base), _name(adapter)).eval()
        layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, FloraLayer)}
        idle: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}

        def reached(layer: nn.Module, args: tuple) -> None:
            idle.pop(layer, None)

        handles = [layer.register_forward_pre_hook(reached) for layer in layers.values()]
        found = _outputs(ours, self.inputs)
        for handle in handles:
            handle.remove()
        theirs = _outputs(FORMS[self.form](self.base, _name(other), **options).eval(), self.inputs)
        effect = _distance(found, self.plain)
        unverified = [] if effect else ["anything: the adapter changes no output"]
        if idle and effect:
            first = next(iter(idle.values())).removeprefix("base_model.model.")
            unverified.append(f"{len(idle)} layers that the example inputs do not reach, such as {first}")
        largest = max(tensor.abs().max().item() for tensor in found)
        return OutputDifference(_distance(found, theirs), largest, effect, tuple(unverified))


def _component_folder(model: str, adapter: str | Path | None, component: str | None) -> str:
    """The folder of a pipeline's component; any other model as it is."""
    folder = local_path(model)
    if folder is None or not (folder / PIPELINE).is_file():
        return model
    name = component or (component_of(Adapter.open(adapter)) if adapter and local_path(adapter) else None)
    if name is None or not (folder / name).is_dir():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        wanted = f"component {name!r}" if name else "the adapter's component is not known"
        raise ValueError(f"{model} is a pipeline ({wanted}): give one of its folders, {', '.join(parts)}")
    return str(folder / name)


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
    own = {name_of("lora_unet", other): name_of("lora_unet", name) for name, other in sgm_names(model).items()}
    with open_tensors(Path(path)) as file:
        keys = {key: key.partition(".") for key in file.keys()}
        tensors = {f"{own.get(name, name)}.{end}": file.get_tensor(key) for key, (name, _, end) in keys.items()}
    names = {key.partition(".")[0] for key in tensors}
    before, LycorisNetwork.LORA_PREFIX = LycorisNetwork.LORA_PREFIX, _prefix_of(model, names, path)
    try:
        network, _ = create_lycoris_from_weights(1.0, path, model, weights_sd=tensors)
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
