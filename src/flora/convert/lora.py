"""To and from PEFT's LoRA, exactly: no singular value decomposition, no loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flora.convert.adapter import PREFIX, Adapter, Update, adapter_folder, bar, read_config, summary, write_adapter
from flora.convert.checkpoint import Checkpoint
from flora.convert.merge import merged_weight
from flora.convert.products import Product, from_product, from_stack, outside_obstacle, padded, product, refuse
from flora.files import WEIGHTS, new_folder, open_tensors
from flora.layers.kinds import CONV, EMBEDDING, LINEAR, LINEAR_TRANSPOSED, RAW
from flora.layers.sites import Site
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import get_pattern_key

CARRIED = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")

# ------------------------------------------------------------------------------------------- what has such a product


def obstacle(site: Site, shape: Sequence[int], others: Iterable[Site] = ()) -> str | None:
    """Why PEFT's LoRA has no form for this weight's update that loads and is exact; None if it has one."""
    if site.kind is RAW:
        if len(shape) not in (2, 3):
            return f"a raw parameter of {len(shape)} modes, where LoRA knows 2 and 3"
        mixed = any(f"{other.module}.".startswith(f"{site.module}.") and other.kind is not RAW for other in others)
        return "a raw parameter of a layer that is adapted, too, or has adapted layers in it" if mixed else None
    if site.kind.lora_form is None:
        return f"LoRA has no form for {site.kind.name}"
    if outside := outside_obstacle(site):
        return outside
    if site.groups > 1:
        return "a grouped convolution"
    if site.dilated:
        return "LoRA ignores the dilation"
    return f"LoRA ignores padding_mode={site.padding_mode!r}" if site.padding_mode != "zeros" else None


# ------------------------------------------------------------------------------------------------------------- export


def export_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    ragged: bool = False,
    merge_rest: str | Path | None = None,
    progress: bool = False,
) -> str:
    """Write a FLoRA adapter as a plain PEFT LoRA that gives the same outputs.

    The scale is in B, and alpha is the rank, so that LoRA's own scale is 1. Every layer gets the largest rank needed,
    filled up with zeros; with ``ragged`` each keeps its own by ``rank_pattern``, which some programs ignore.

    Args:
        merge_rest: the base model's weights, a folder, file or name on the hub. Layers without a LoRA form are then
            saved whole, the update merged into their weights, as PEFT's ``modules_to_save``.

    Returns:
        what was written, in a line.

    Raises:
        ValueError: with the layers that have no LoRA form; nothing is written then.
    """
    source = Adapter.open(adapter)
    sites = source.sites
    obstacles = {site: reason for site in sites if (reason := obstacle(site, source.shape(site), sites))}
    if merge_rest is None or len(obstacles) == len(sites):
        refuse(source, obstacles, "LoRA form", "--merge-rest BASE saves them whole; `flora merge` merges the model")
    with new_folder(Path(out)) as folder:
        rest = _merged(source, obstacles, merge_rest) if obstacles else {}
        pairs, config = lora_of(source, ragged, progress, without=obstacles)
        tensors = {key: tensor for site, pair in pairs.items() for key, tensor in _named(site, pair, pairs)}
        save_file(tensors | rest | source.other_tensors(), folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    count = sum(tensor.numel() for tensor in tensors.values())
    whole = f"; saved whole: {', '.join(_modules(obstacles))}" if obstacles else ""
    return f"{out}: LoRA of rank {config.r}, {len(pairs)} weights, {count:,} parameters{whole}"


def _modules(sites: Iterable[Site]) -> list[str]:
    return list(dict.fromkeys(site.module for site in sites))


def _merged(source: Adapter, sites: Iterable[Site], base: str | Path) -> dict[str, Tensor]:
    """All tensors of these sites' modules, the updates merged into their weights, under PEFT's names."""
    checkpoint = Checkpoint.open(base)
    modules = _modules(sites)
    for site in source.sites:
        if site.module not in modules and site.module.startswith(tuple(f"{module}." for module in modules)):
            raise ValueError(f"{source.folder}: {site.name!r} lies in a module that would have to be saved whole")
    tensors = {}
    for update in source.updates():
        if (module := update.site.module) in modules:
            key = checkpoint.find(module, update.site.parameter)
            if checkpoint.shape(key) != update.shape:
                raise ValueError(
                    f"{base}: {key!r} has shape {list(checkpoint.shape(key))}, the update {list(update.shape)}"
                )
            on_disk = key.removesuffix(f".{update.site.parameter}")
            for other in checkpoint.keys():
                if other.startswith(f"{on_disk}."):
                    tensors.setdefault(f"{PREFIX}{module}{other.removeprefix(on_disk)}", checkpoint.tensor(other))
            name = f"{PREFIX}{module}.{update.site.parameter}"
            tensors[name] = merged_weight(update, tensors[name])
    return tensors


def lora_of(
    source: Adapter, ragged: bool = False, progress: bool = False, without: Iterable[Site] = ()
) -> tuple[dict[Site, Product], LoraConfig]:
    """The products of all weights but those ``without``, of one rank unless ``ragged``, and the config that goes with
    them, in which the modules of the others are saved whole."""
    others = set(without)
    updates = bar(source.updates(), len(source.sites), "export", progress)
    pairs = {update.site: product(update) for update in updates if update.site not in others}
    ranks = {site: left.shape[1] for site, (left, _) in pairs.items()}
    rank = max(ranks.values())
    pattern = {f"^{site.name}": own for site, own in ranks.items() if own != rank} if ragged else {}
    if not ragged:
        pairs = {site: padded(pair, rank) for site, pair in pairs.items()}
    layers = [site for site in pairs if site.kind is not RAW]
    # in the order of PEFT's own wrapping, for import_lora
    raw = sorted((site for site in pairs if site.kind is RAW), key=lambda site: site.depth)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=[site.module for site in layers] if others else _targets(source.config, layers),
        target_parameters=[f"{site.module}.{site.parameter}" for site in raw] or None,
        bias=source.config.bias.replace("flora_only", "lora_only"),
        trainable_token_indices=source.config.trainable_token_indices,
        fan_in_fan_out=bool(layers) and not raw and all(site.kind is LINEAR_TRANSPOSED for site in layers),
        modules_to_save=[*(source.config.modules_to_save or ()), *_modules(others)] or None,
        inference_mode=True,
        **{name: getattr(source.config, name) for name in CARRIED},
    )
    return pairs, config


def _targets(config: FloraConfig, layers: list[Site]) -> list[str]:
    """The user's own list where it names just these layers, else the layers' names: lists, since not every program
    that reads a LoRA knows a regex."""
    asked = config.target_modules
    plain = isinstance(asked, set) and not (config.exclude_modules or config.layers_to_transform is not None)
    whole = plain and all(any(f".{site.module}".endswith(f".{name}") for name in asked) for site in layers)
    return sorted(asked) if whole else [site.module for site in layers]


def _named(site: Site, pair: Product, sites: Iterable[Site]) -> list[tuple[str, Tensor]]:
    """PEFT's names and layouts of a product's two tensors."""
    left, right = pair
    stem, names = f"{PREFIX}{site.module}", ("lora_A.weight", "lora_B.weight")
    if site.kind.lora_form == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    elif site.kind is RAW:  # PEFT wraps them in the module's order, which makes the last one the outermost
        stem += ".base_layer" * (sum(other.module == site.module for other in sites) - 1 - site.depth)
    if left.ndim == 3:  # of a stack: experts slowest in A, fastest in B
        left, right = left.flatten(1), right.transpose(0, 1).flatten(0, 1)
    elif site.kind.lora_form == "conv":
        left = left.view(*left.shape, *[1] * (right.ndim - 2))
    return [(f"{stem}.{name}", tensor.contiguous()) for name, tensor in zip(names, (right, left), strict=True)]


# ------------------------------------------------------------------------------------------------------------- import


def import_lora(lora: str | Path, out: str | Path, *, is_transposed: bool = False, progress: bool = False) -> str:
    """Write a PEFT LoRA as a FLoRA adapter that gives the same outputs, to be trained on, merged or compressed.

    Args:
        is_transposed: stacked parameters are (experts, in, out), which a LoRA's file does not tell.

    Returns:
        what was written, in a line.

    Raises:
        ValueError: naming file, key and shape, where it is no LoRA, or one that is no plain update of weights (DoRA …).
    """
    path = adapter_folder(lora) / WEIGHTS
    content = read_config(path.parent, "LORA")
    if options := [name for name in ("use_dora", "lora_bias", "alora_invocation_tokens") if content.get(name)]:
        raise ValueError(
            f"{path.with_name('adapter_config.json')}: {options[0]} makes it more than an update of weights"
        )
    config = LoraConfig.from_pretrained(str(path.parent))
    with new_folder(Path(out)) as folder, open_tensors(path) as file:
        keys = list(file.keys())
        pairs = {
            key: key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B") for key in keys if _is_a(key)
        }
        if missing := [key for pair in pairs.items() for key in pair if key not in keys]:
            raise ValueError(f"{path}: {missing[0]!r} is missing")
        rest = [key for key in keys if key not in pairs and key not in pairs.values()]
        if not pairs or (strange := [key for key in rest if "lora_" in key]):
            raise ValueError(f"{path} is no plain LoRA: it has {(strange if pairs else keys)[:1]}")
        updates = []
        for a, b in bar(pairs.items(), len(pairs), "import", progress):
            try:
                updates.append(_update(a, file.get_tensor(b), file.get_tensor(a), config, is_transposed))
            except ValueError as error:
                raise ValueError(f"{path}: {a!r}: {error}") from None
        write_adapter(folder, _flora_config(config), updates, {key: file.get_tensor(key) for key in rest})
    return f"{out}: {summary(updates)}"


def _is_a(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_embedding_A"))


def _update(key: str, b: Tensor, a: Tensor, config: LoraConfig, is_transposed: bool) -> Update:
    """The update of PEFT's tensors A and B; ``key`` is A's."""
    stem = key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
    module, *inner = stem.split(".base_layer")
    if any(inner):
        raise ValueError("a weight inside an attention layer is not known here")
    raw = [name for name in config.target_parameters or () if f".{module}".endswith(f".{name.rpartition('.')[0]}")]
    if raw:  # PEFT's last one is the outermost
        parameter = raw[len(raw) - 1 - len(inner)].rpartition(".")[2]
        path = module + ".base_layer" * (len(raw) - 1 - len(inner))
        site = Site(RAW, module, parameter, path, is_transposed=is_transposed)
    else:
        linear = LINEAR_TRANSPOSED if config.fan_in_fan_out else LINEAR
        site = Site(EMBEDDING if "embedding" in key else linear if a.ndim == 2 else CONV, module)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, site.name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, site.name), config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if a.shape[0] % rank or b.ndim < 2 or a.shape[0] != b.shape[1] or (not raw and a.shape[0] != rank):
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)} are not those of rank {rank}")
    if a.shape[0] != rank:
        core, factors = from_stack(a, b, rank, is_transposed)
    else:
        core, factors = from_product(b.flatten(1), a, transposed=site.kind.input_first)
    return Update(site, core, tuple(factors), scale)


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
        **{name: getattr(config, name) for name in CARRIED},
    )
