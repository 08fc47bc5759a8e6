"""To PEFT's LoRA, exactly: no singular value decomposition, no loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from flora.convert.adapter import PREFIX, Adapter, progress_bar
from flora.convert.checkpoint import Checkpoint
from flora.convert.products import Product, beside_obstacle, pad_rank, product, refuse
from flora.convert.readers import readers_of_lora
from flora.files import WEIGHTS, new_folder, save_tensors
from flora.layers.sites import Site
from flora.tuner.config import FloraConfig

# fields that both configs have
COMMON = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")


def lora_obstacle(site: Site, shape: Sequence[int], others: Iterable[Site] = ()) -> str | None:
    """Why PEFT's LoRA has no form for this update that loads and is exact; None if it has one.

    Args:
        shape: the weight's.
        others: the adapter's sites.
    """
    if site.kind.lora_form is None:
        return f"LoRA has no form for {site.kind.name}"
    if _is_raw(site):
        if site.contained:
            return "a parameter of a list or dictionary, which LoRA can't run"
        if len(shape) not in (2, 3):
            return f"a raw parameter of {len(shape)} modes; LoRA takes 2 or 3"
        mixed = any(f"{other.module}.".startswith(f"{site.module}.") and not _is_raw(other) for other in others)
        return "a raw parameter of a layer that is adapted too, or contains adapted layers" if mixed else None
    if obstacle := beside_obstacle(site):
        return obstacle
    if site.groups > 1:
        return "a grouped convolution"
    if site.dilated:
        return "LoRA ignores the dilation"
    return f"LoRA ignores padding_mode={site.padding_mode!r}" if site.padding_mode != "zeros" else None


def _is_raw(site: Site) -> bool:
    return site.kind.lora_form == "parameter"


def pattern_name(site: Site) -> str:
    """The name that PEFT holds against the patterns of ranks and alphas."""
    return f"{site.module}.{site.parameter}" if _is_raw(site) else site.module


# --------------------------------------------------------------------------------------------------------------- export


def export_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    ragged: bool = False,
    merge_rest: str | Path | None = None,
    progress: bool = False,
) -> str:
    """Write a FLoRA adapter as a plain PEFT LoRA that gives the same outputs.

    B holds the scale, and alpha is the rank, so that LoRA's own scale is 1.

    Args:
        adapter: a folder, or a name on the hub.
        out: a new folder.
        ragged: give every layer its own rank, through ``rank_pattern``, which some programs ignore. Otherwise all
            layers get the largest rank, filled up with zeros.
        merge_rest: the base model's weights (a folder, a file or a name on the hub). Layers without a LoRA form are
            then saved whole, merged, as PEFT's ``modules_to_save``.
        progress: show a progress bar.

    Returns:
        a line that describes the LoRA, and one that says which programs read it.

    Raises:
        ValueError: listing the layers without a LoRA form. Nothing is written then.
        FileExistsError: if ``out`` exists.
    """
    source = Adapter.open(adapter)
    sites = source.sites
    obstacles = {site: reason for site in sites if (reason := lora_obstacle(site, source.shape(site), sites))}
    if merge_rest is None or len(obstacles) == len(sites):
        refuse(source, obstacles, "LoRA form", "--merge-rest BASE saves them whole; `flora merge` merges the model")
    with new_folder(out) as folder:
        whole = _merged_layers(source, obstacles, merge_rest) if obstacles and merge_rest else {}
        products, config = lora_of(source, ragged, progress, without=obstacles)
        tensors = {key: tensor for site, pair in products.items() for key, tensor in _named(site, pair, products)}
        save_tensors(folder / WEIGHTS, tensors | whole | source.other_tensors())
        config.save_pretrained(str(folder))
    count = sum(tensor.numel() for tensor in tensors.values())
    saved = f"; saved whole: {', '.join(_modules(obstacles))}" if obstacles else ""
    line = f"{out}: LoRA of rank {config.r}, {len(products)} weights, {count:,} parameters{saved}"
    return f"{line}\n{readers_of_lora(products, config.r)}"


def _modules(sites: Iterable[Site]) -> list[str]:
    return list(dict.fromkeys(site.module for site in sites))


def _merged_layers(source: Adapter, sites: Iterable[Site], base: str | Path) -> dict[str, Tensor]:
    """All tensors of these sites' modules by PEFT's names, with the updates merged into the weights."""
    checkpoint = Checkpoint.open(base)
    modules = _modules(sites)
    for site in source.sites:
        if site.module not in modules and site.module.startswith(tuple(f"{module}." for module in modules)):
            raise ValueError(f"{source.folder}: {site.name!r} lies in a module that would have to be saved whole")
    tensors: dict[str, Tensor] = {}
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
            tensors[name] = update.merged_into(tensors[name])
    return tensors


def lora_of(
    source: Adapter, ragged: bool = False, progress: bool = False, without: Iterable[Site] = ()
) -> tuple[dict[Site, Product], LoraConfig]:
    """The products of all updates except those ``without``, whose modules are saved whole, and the config to match.
    All products have one rank unless ``ragged``."""
    excluded = set(without)
    updates = progress_bar(source.updates(), len(source.sites), "export", progress)
    products = {update.site: product(update) for update in updates if update.site not in excluded}
    ranks = {site: left.shape[1] for site, (left, _) in products.items()}
    rank = max(ranks.values())
    pattern = {f"^{pattern_name(site)}": own for site, own in ranks.items() if own != rank} if ragged else {}
    if not ragged:
        products = {site: pad_rank(pair, rank) for site, pair in products.items()}
    layers = [site for site in products if not _is_raw(site)]
    # in the order of PEFT's own wrapping, for import_lora
    raw = sorted((site for site in products if _is_raw(site)), key=lambda site: site.depth)
    transposed = [site for site in layers if site.kind.lora_form == "linear" and site.kind.input_first]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=[site.module for site in layers] if excluded else _target_modules(source.config, layers),
        target_parameters=[f"{site.module}.{site.parameter}" for site in raw] or None,
        bias=source.config.bias.replace("flora_only", "lora_only"),
        trainable_token_indices=source.config.trainable_token_indices,
        fan_in_fan_out=bool(layers) and not raw and len(transposed) == len(layers),
        modules_to_save=[*(source.config.modules_to_save or ()), *_modules(excluded)] or None,
        inference_mode=True,
        **{name: getattr(source.config, name) for name in COMMON},
    )
    return products, config


def _target_modules(config: FloraConfig, layers: list[Site]) -> list[str]:
    """The user's own list if it names exactly these layers, else the layers' names. Always a list: not every program
    that reads a LoRA takes a regex."""
    names = config.target_modules
    if isinstance(names, set) and not config.exclude_modules and config.layers_to_transform is None:
        if all(any(f".{site.module}".endswith(f".{name}") for name in names) for site in layers):
            return sorted(names)
    return [site.module for site in layers]


def _named(site: Site, pair: Product, sites: Iterable[Site]) -> list[tuple[str, Tensor]]:
    """A product's two tensors by PEFT's names and in its layouts."""
    left, right = pair
    stem, names = f"{PREFIX}{site.module}", ("lora_A.weight", "lora_B.weight")
    if site.kind.lora_form == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    elif _is_raw(site):  # PEFT wraps them in the module's order, which makes the last one the outermost
        stem += ".base_layer" * (sum(other.module == site.module for other in sites) - 1 - site.depth)
    if left.ndim == 3:  # of a stack: the expert varies slowest in A, fastest in B
        left, right = left.flatten(1), right.transpose(0, 1).flatten(0, 1)
    elif site.kind.lora_form == "conv":
        left = left.view(*left.shape, *[1] * (right.ndim - 2))
    return [(f"{stem}.{name}", tensor.contiguous()) for name, tensor in zip(names, (right, left), strict=True)]
