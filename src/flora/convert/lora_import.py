"""From PEFT's LoRA, exactly: what its files do not tell is asked of the base model, or the LoRA is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from flora.convert.adapter import (
    PREFIX,
    Update,
    adapter_folder,
    finite,
    progress_bar,
    read_config,
    summary,
    write_adapter,
)
from flora.convert.checkpoint import Checkpoint
from flora.convert.lora import COMMON, lora_obstacle, pattern_name
from flora.convert.products import from_product, from_stack
from flora.files import WEIGHTS, new_folder, open_tensors
from flora.layers import kinds
from flora.layers.kinds import CONV, EMBEDDING, LINEAR, LINEAR_TRANSPOSED, RAW
from flora.layers.sites import Site
from flora.models import empty_model
from flora.tuner.checks import check_types
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import get_pattern_key

# fields of LoraConfig that are read here, or do not change what A and B mean; all others must be off
KNOWN = (
    "peft_type", "peft_version", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices",
    "target_parameters", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "megatron_config", "megatron_core", "qalora_group_size", *COMMON,
)  # fmt: skip
# starts that leave the base model's weights alone, those that change them in a way that BASE tells, and all others
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
BASE_STARTS = ("pissa", "olora")


def import_lora(
    lora: str | Path,
    out: str | Path,
    *,
    base: nn.Module | str | Path | None = None,
    is_transposed: bool = False,
    progress: bool = False,
) -> str:
    """Write a PEFT LoRA as a FLoRA adapter that gives the same outputs, to train on, merge or compress.

    A LoRA's files do not tell the order of a square weight's modes, the options of its convolutions, and what its start
    took from the base weights. With ``base`` all of this is exact or refused. Without it, linear layers are what the
    config's ``fan_in_fan_out`` says, convolutions are plain, and a weight of another order is refused when the adapter
    is loaded onto its model.

    Args:
        lora: a folder, or a name on the hub.
        out: a new folder.
        base: the model that it adapts, its folder, or its name on the hub. PiSSA and OLoRA need it.
        is_transposed: without ``base``, whether stacked parameters are (experts, in, out).
        progress: show a progress bar.

    Returns:
        a line that describes the adapter.

    Raises:
        ValueError: naming file, key and shape, if it is not a LoRA, or not a plain update of weights (DoRA, CorDA,
            LoftQ, LoRA-GA, replicated layers …), or does not fit ``base``.
        FileExistsError: if ``out`` exists.
    """
    path = adapter_folder(lora) / WEIGHTS
    config = _plain_config(path.with_name("adapter_config.json"), with_base=base is not None)
    layers = _Layers(config, is_transposed) if base is None else _BaseLayers(config, base)
    with new_folder(out) as folder, open_tensors(path) as file:
        pairs, others = _pairs(path, file)
        updates = []
        for a, b in progress_bar(pairs.items(), len(pairs), "import", progress):
            try:
                updates.append(_update(layers, a, file.get_tensor(b), file.get_tensor(a)))
            except ValueError as error:
                raise ValueError(f"{path}: {a!r}: {error}") from None
        kept = finite(str(path), {key: file.get_tensor(key) for key in others})
        write_adapter(folder, _flora_config(config), updates, kept)
    guess = "; the kinds of its layers were taken from its config: give BASE to check them" if base is None else ""
    return f"{out}: {summary(updates)}{guess}"


def _plain_config(path: Path, with_base: bool) -> LoraConfig:
    """The config of a LoRA that is nothing but an update of weights. Raises ValueError for any other."""
    content = read_config(path.parent, "LORA")
    for name, value in content.items():
        if name not in KNOWN and value:
            raise ValueError(f"{path}: {name}={value!r} makes it more than an update of the base model's weights")
    given = content.get("init_lora_weights", True)
    start = given.lower() if isinstance(given, str) else given
    if start in BASE_STARTS and not with_base:
        raise ValueError(f"{path}: init_lora_weights={start!r} changes the base weights: give BASE to import it")
    if start not in (*PLAIN_STARTS, *BASE_STARTS):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changes the base weights in a way that no file tells: save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    try:
        config = LoraConfig.from_pretrained(str(path.parent))
        check_types(config)
    except Exception as error:  # PEFT's reading of a corrupt file may raise anything
        raise ValueError(f"{path}: {error}") from error
    return config


def _pairs(path: Path, file: safe_open) -> tuple[dict[str, str], list[str]]:
    """The key of each A with the key of its B, and all other keys."""
    keys = list(file.keys())
    pairs = {
        key: key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        for key in keys
        if key.endswith((".lora_A.weight", ".lora_embedding_A"))
    }
    if missing := {key for pair in pairs.items() for key in pair} - {*keys}:
        raise ValueError(f"{path}: {min(missing)!r} is missing")
    others = [key for key in keys if key not in pairs and key not in pairs.values()]
    if not pairs or (strange := [key for key in others if "lora_" in key]):
        raise ValueError(f"{path} is not a plain LoRA: it has {(strange if pairs else keys)[:1]}")
    return pairs, others


def _update(layers: _Layers, key: str, b: Tensor, a: Tensor) -> Update:
    """The update of A and B; ``key`` is A's."""
    stem = key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
    module, *inner = stem.split(".base_layer")
    if any(inner):
        raise ValueError("a weight inside an attention layer cannot be imported")
    site = layers.site(module, len(inner), a, is_embedding=key.endswith("lora_embedding_A"))
    rank, alpha = layers.size(site)
    scale = alpha / (math.sqrt(rank) if layers.config.use_rslora else rank)
    if a.shape[0] % rank or b.ndim < 2 or a.shape[0] != b.shape[1] or (site.kind is not RAW and a.shape[0] != rank):
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)} are not those of rank {rank}")
    if layers.is_stack(site, a):
        core, factors = from_stack(a, b, rank, site.is_transposed)
    else:
        a, b = layers.without_start(site, a, b)
        core, factors = from_product(b.flatten(1), a, transposed=site.kind.input_first)
    update = Update(site, core, tuple(factors), scale)
    layers.check(update)
    return update


class _Layers:
    """What a LoRA's files tell of its layers."""

    def __init__(self, config: LoraConfig, is_transposed: bool = False) -> None:
        self.config = config
        self.is_transposed = is_transposed

    def size(self, site: Site) -> tuple[int, float]:
        """Rank and alpha."""
        ranks, alphas, name = self.config.rank_pattern, self.config.alpha_pattern, pattern_name(site)
        rank = ranks.get(get_pattern_key(ranks, name), self.config.r)
        return rank, alphas.get(get_pattern_key(alphas, name), self.config.lora_alpha)

    def site(self, module: str, depth: int, a: Tensor, is_embedding: bool) -> Site:
        """The site of a pair. ``depth``: of PEFT's wrapper among those of raw parameters; its last one is outermost."""
        if raw := self.raw_parameters(module):
            if depth >= len(raw):
                raise ValueError(f"target_parameters has {len(raw)} parameters of {module!r}")
            index = len(raw) - 1 - depth
            return self.raw_site(module, raw[index], module + ".base_layer" * index)
        return self.layer_site(module, a, is_embedding)

    def raw_parameters(self, module: str) -> list[str]:
        """The parameters of a module that ``target_parameters`` names, in PEFT's order."""
        names = [name.rpartition(".") for name in self.config.target_parameters or ()]
        return list(dict.fromkeys(leaf for owner, _, leaf in names if f".{module}".endswith(f".{owner}")))

    def raw_site(self, module: str, parameter: str, path: str) -> Site:
        return Site(RAW, module, parameter, path, is_transposed=self.is_transposed)

    def layer_site(self, module: str, a: Tensor, is_embedding: bool) -> Site:
        linear = LINEAR_TRANSPOSED if self.config.fan_in_fan_out else LINEAR
        return Site(EMBEDDING if is_embedding else linear if a.ndim == 2 else CONV, module)

    def is_stack(self, site: Site, a: Tensor) -> bool:
        """Whether A and B are those of stacked matrices."""
        return a.shape[0] != self.size(site)[0]

    def without_start(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B whose product is the whole update of the base weight."""
        return a, b

    def check(self, update: Update) -> None:
        """Raise ValueError if the update does not fit its layer."""


class _BaseLayers(_Layers):
    """What the base model tells of them besides."""

    def __init__(self, config: LoraConfig, base: nn.Module | str | Path) -> None:
        super().__init__(config)
        self.model = base if isinstance(base, nn.Module) else empty_model(str(base))
        self.weights = None if isinstance(base, nn.Module) else base

    def layer(self, module: str) -> nn.Module:
        try:
            return self.model.get_submodule(module)
        except AttributeError:
            raise ValueError(f"the base model has no layer {module!r}") from None

    def raw_parameters(self, module: str) -> list[str]:
        targets = self.config.target_parameters or ()
        names = self.layer(module)._parameters if targets else ()
        return [name for name in names if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]

    def raw_site(self, module: str, parameter: str, path: str) -> Site:
        return self._plain(replace(self._site(module, parameter), path=path if path != module else ""))

    def layer_site(self, module: str, a: Tensor, is_embedding: bool) -> Site:
        return self._plain(self._site(module, "weight"))

    def _site(self, module: str, parameter: str) -> Site:
        layer = self.layer(module)
        return Site.of(layer, kinds.describe(layer, parameter)[0], module, parameter)

    def _plain(self, site: Site) -> Site:
        if reason := lora_obstacle(site, self.shape(site)):
            raise ValueError(f"{reason}: no update of the weight of {site.name!r} is the same")
        return site

    def shape(self, site: Site) -> tuple[int, ...]:
        return kinds.describe(self.layer(site.module), site.parameter)[1]

    def is_stack(self, site: Site, a: Tensor) -> bool:
        return site.kind is RAW and len(self.shape(site)) == 3

    def without_start(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """PiSSA and OLoRA take B0 A0 out of the base weight: [B, -B0] and [A; A0] put it back."""
        start = self.config.init_lora_weights
        if start in PLAIN_STARTS:
            return a, b
        if site.kind is not LINEAR and (site.kind is not LINEAR_TRANSPOSED or start == "olora"):
            raise ValueError(f"init_lora_weights={start!r} of a {site.kind.name} cannot be imported")
        a0, b0 = peft_start(self.weight(site), site, self.config, *self.size(site))
        wide = torch.promote_types(a.dtype, a0.dtype)
        return torch.cat([a.to(wide), a0.to(wide)]), torch.cat([b.to(wide), -b0.to(wide)], dim=1)

    def weight(self, site: Site) -> Tensor:
        if self.weights is None:
            return self.layer(site.module).get_parameter(site.parameter).detach()
        checkpoint = Checkpoint.open(self.weights)
        return checkpoint.tensor(checkpoint.find(site.module, site.parameter))

    def check(self, update: Update) -> None:
        if update.shape != (shape := self.shape(update.site)):
            raise ValueError(f"the update has shape {list(update.shape)}, the base model's weight {list(shape)}")


def peft_start(weight: Tensor, site: Site, config: LoraConfig, rank: int, alpha: float) -> tuple[Tensor, Tensor]:
    """The A0 and B0 with which PEFT starts on this weight. Both are computed from the weight alone."""
    out, inputs = weight.shape[::-1] if site.kind.input_first else weight.shape
    with torch.random.fork_rng(devices=[]):
        layer: Any = nn.Linear(inputs, out, bias=False, device="meta")
        if site.kind.input_first:
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(out, inputs)
        narrow = weight.float() if weight.dtype == torch.float64 else weight.clone()  # PEFT takes no more
        layer.weight = nn.Parameter(narrow, requires_grad=False)
        own = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
            fan_in_fan_out=site.kind.input_first,
            target_modules=["0"],
        )
        adapted: Any = get_peft_model(nn.Sequential(layer), own).base_model.model[0]
    return adapted.lora_A["default"].weight.detach(), adapted.lora_B["default"].weight.detach()


def _flora_config(config: LoraConfig) -> FloraConfig:
    return FloraConfig(
        r=1,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        bias=config.bias.replace("lora_only", "flora_only"),
        trainable_token_indices=config.trainable_token_indices,
        modules_to_save=config.modules_to_save,
        **{name: getattr(config, name) for name in COMMON},
    )
