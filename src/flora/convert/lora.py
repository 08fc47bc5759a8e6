"""To and from PEFT's LoRA, exactly: no singular value decomposition, no loss.

A weight's update, unfolded along its output mode, is a product B A of (out, q) and (q, inputs · kernel). The core is
folded into the side that has more ranks, so q is the smaller of the output's rank and of the other ranks' product: for
a linear layer min(r_out, r_in); for a convolution mostly r_out, with A = K ∘ (input factor), (r_out, in, k …), where
K = G ×_3 C ×_4 D is the core at the kernel's size (equation 6), and with B the output factor.

Letters: q the rank of a product, e the matrices of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from flora import tucker
from flora.config import FloraConfig
from flora.convert.adapter import PREFIX, Adapter, Update, bar, read_config, summary, write_adapter
from flora.files import WEIGHTS, new_folder, open_tensors
from flora.kinds import Site, output_mode

Product = tuple[Tensor, Tensor]
CARRIED = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "modules_to_save")

# ------------------------------------------------------------------------------------------- what has such a product


def obstacle(site: Site, shape: Sequence[int], others: Iterable[Site] = ()) -> str | None:
    """Why PEFT's LoRA has no form for this weight's update that loads and is exact; None if it has one."""
    if site.kind == "parameter":
        if len(shape) not in (2, 3):
            return f"a raw parameter of {len(shape)} modes, where LoRA knows 2 and 3"
        mixed = any(other.module == site.module and other.kind != "parameter" for other in others)
        return "a raw parameter of a layer that is adapted, too" if mixed else None
    if site.kind not in ("Linear", "Conv1D", "Conv", "Embedding"):
        return f"LoRA has no form for {site.kind}"
    return outside_obstacle(site) or (
        "a grouped convolution"
        if site.groups > 1
        else "LoRA ignores the dilation"
        if site.dilated
        else f"LoRA ignores padding_mode={site.padding_mode!r}"
        if site.padding_mode != "zeros"
        else None
    )


def outside_obstacle(site: Site) -> str | None:
    """Why no adapter that runs beside the layer can do the same; None if one can."""
    return None if site.beside else "the layer does more with its weight than a plain one"


def refuse(source: Adapter, reasons: dict[Site, str], what: str, advice: str) -> None:
    """Raise ValueError with all the layers that have a reason, if any has."""
    if reasons:
        lines = [f"  {site.name}: {reason}" for site, reason in list(reasons.items())[:10]]
        more = [f"  and {len(reasons) - 10} more"] if len(reasons) > 10 else []
        head = f"{source.folder}: {len(reasons)} of {len(source.sites)} weights have no {what} that loads and is exact:"
        raise ValueError("\n".join([head, *lines, *more, advice]))


# -------------------------------------------------------------------------------------------------------- the product


def product(update: Update) -> Product:
    """(B, A): (out, q) and (q, in, k …), the scale in B; of a stack (out, q, e) and (q, e, in)."""
    core, factors = update.exact()
    if update.site.kind == "parameter" and core.ndim == 3:
        left, right = _stack_product(core, factors, update.site.is_transposed)
    else:
        mode = 0 if update.site.kind == "parameter" else output_mode(update.site.roles)
        left, right = tucker.as_product(core, factors, mode)
    return left.to(update.dtype), right.to(update.dtype)


def _stack_product(core: Tensor, factors: list[Tensor], is_transposed: bool) -> Product:
    cores = torch.tensordot(factors[0], core, 1)  # (e, r_out, r_in)
    outer, inner = factors[1:]
    if is_transposed:
        cores, outer, inner = cores.mT, inner, outer
    experts, r_out, r_in = cores.shape
    if r_in <= r_out:
        return torch.einsum("or,ers->ose", outer, cores), inner.mT.unsqueeze(1).expand(-1, experts, -1)
    return outer.unsqueeze(2).expand(-1, -1, experts), torch.einsum("ers,is->rei", cores, inner)


def padded(pair: Product, rank: int) -> Product:
    """The product with zeros up to ``rank``."""
    left, right = pair
    missing = rank - left.shape[1]
    return (
        torch.cat([left, left.new_zeros(left.shape[0], missing, *left.shape[2:])], dim=1),
        torch.cat([right, right.new_zeros(missing, *right.shape[1:])], dim=0),
    )


# ------------------------------------------------------------------------------------------------------------- export


def export_lora(adapter: str | Path, out: str | Path, *, ragged: bool = False, progress: bool = False) -> str:
    """Write a FLoRA adapter as a plain PEFT LoRA that gives the same outputs.

    The scale is in B, and alpha is the rank, so that LoRA's own scale is 1. Every layer gets the largest rank needed,
    filled up with zeros; with ``ragged`` each keeps its own by ``rank_pattern``, which some programs ignore.

    Returns:
        what was written, in a line.

    Raises:
        ValueError: with the layers that have no LoRA form; nothing is written then.
    """
    source = Adapter.open(adapter)
    with new_folder(Path(out)) as folder:
        pairs, config = lora_of(source, ragged, progress)
        tensors = {key: tensor for site, pair in pairs.items() for key, tensor in _named(site, pair, pairs)}
        save_file(tensors | source.other_tensors(), folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{out}: LoRA of rank {config.r}, {len(pairs)} weights, {count:,} parameters"


def lora_of(source: Adapter, ragged: bool, progress: bool) -> tuple[dict[Site, Product], LoraConfig]:
    """The products of all weights, of one rank unless ``ragged``, and the config that goes with them."""
    reasons, pairs = {}, {}
    for update in bar(source.updates(), len(source.sites), "export", progress):
        if reason := obstacle(update.site, update.shape, source.sites):
            reasons[update.site] = reason
        else:
            pairs[update.site] = product(update)
    refuse(source, reasons, "LoRA form", "`flora merge` writes them into the model")
    ranks = {site: left.shape[1] for site, (left, _) in pairs.items()}
    rank = max(ranks.values())
    pattern = {f"^{site.name}": own for site, own in ranks.items() if own != rank} if ragged else {}
    if not ragged:
        pairs = {site: padded(pair, rank) for site, pair in pairs.items()}
    layers = [site for site in pairs if site.kind != "parameter"]
    # in the order of PEFT's own wrapping, for import_lora
    raw = sorted((site for site in pairs if site.kind == "parameter"), key=lambda site: site.depth)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(source.config, layers),
        target_parameters=[f"{site.module}.{site.parameter}" for site in raw] or None,
        bias=source.config.bias.replace("flora_only", "lora_only"),
        trainable_token_indices=source.config.trainable_token_indices,
        fan_in_fan_out=bool(layers) and not raw and all(site.kind == "Conv1D" for site in layers),
        inference_mode=True,
        **{name: getattr(source.config, name) for name in CARRIED},
    )
    return pairs, config


def _targets(config: FloraConfig, layers: list[Site]) -> list[str]:
    """The user's own list where it names just these layers, else the layers' names: lists, since not every program
    that reads a LoRA knows a regex."""
    asked = config.target_modules
    plain = isinstance(asked, set) and not (config.exclude_modules or config.layers_to_transform is not None)
    whole = plain and all(any(f".{site.name}".endswith(f".{name}") for name in asked) for site in layers)
    return sorted(asked) if whole else [site.name for site in layers]


def _named(site: Site, pair: Product, sites: Iterable[Site]) -> list[tuple[str, Tensor]]:
    """PEFT's names and layouts of a product's two tensors."""
    left, right = pair
    if site.kind == "Embedding":
        stem, names = f"{PREFIX}{site.module}", ("lora_embedding_A", "lora_embedding_B")
    else:
        if site.kind == "parameter":  # PEFT wraps them in the module's order, which makes the last one the outermost
            depth = sum(other.module == site.module for other in sites) - 1 - site.depth
            stem = f"{PREFIX}{site.module}" + ".base_layer" * depth
        else:
            stem = f"{PREFIX}{site.module}"
        names = ("lora_A.weight", "lora_B.weight")
    if left.ndim == 3:  # of a stack: experts slowest in A, fastest in B
        left, right = left.flatten(1), right.transpose(0, 1).flatten(0, 1)
    elif site.kind == "Conv":
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
    path = Path(lora) / WEIGHTS
    content = read_config(Path(lora), "LORA")
    if options := [name for name in ("use_dora", "lora_bias", "alora_invocation_tokens") if content.get(name)]:
        raise ValueError(f"{path.with_name('adapter_config.json')}: {options[0]} makes it more than an update of weights")
    config = LoraConfig.from_pretrained(str(lora))
    with open_tensors(path) as file:
        keys = list(file.keys())
        pairs = {key: key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B") for key in keys if _is_a(key)}
        if missing := [key for pair in pairs.items() for key in pair if key not in keys]:
            raise ValueError(f"{path}: {missing[0]!r} is missing")
        rest = [key for key in keys if key not in pairs and key not in pairs.values()]
        if not pairs or (strange := [key for key in rest if "lora_" in key]):
            raise ValueError(f"{path} is no plain LoRA: it has {(strange if pairs else keys)[:1]}")
        with new_folder(Path(out)) as folder:
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
        site = Site("parameter", module, parameter, depth=len(raw) - 1 - len(inner), is_transposed=is_transposed)
    else:
        linear = "Conv1D" if config.fan_in_fan_out else "Linear"
        site = Site("Embedding" if "embedding" in key else linear if a.ndim == 2 else "Conv", module)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, site.name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, site.name), config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if a.shape[0] % rank or b.ndim < 2 or a.shape[0] != b.shape[1] or (not raw and a.shape[0] != rank):
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)} are not those of rank {rank}")
    if a.shape[0] != rank:
        core, factors = _stack(a, b, rank, is_transposed)
    else:
        core, factors = from_product(b.flatten(1), a, transposed=site.kind in ("Conv1D", "Embedding"))
    return Update(site, core, tuple(factors), scale)


def from_product(left: Tensor, right: Tensor, transposed: bool = False) -> tuple[Tensor, list[Tensor]]:
    """(out, q) and (q, in, k …) -> core and factors of their product, (out, in, k …); of (in, out) if ``transposed``."""
    sizes = right.shape[1:]
    identities = [torch.eye(size, dtype=right.dtype) for size in sizes]
    if len(sizes) == 1:
        core, factors = torch.eye(right.shape[0], dtype=right.dtype), [left, right.mT]
    else:
        core, factors = right, [left, *identities]
    core, factors = cut(core, factors)
    return (core.mT, factors[::-1]) if transposed else (core, factors)


def cut(core: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``tucker.cut_ranks``, in float64 where there is something to cut."""
    if all(factor.shape[1] <= factor.shape[0] for factor in factors):
        return core, list(factors)
    cores, wide = tucker.cut_ranks(core.double(), [factor.double() for factor in factors])
    return cores.to(core.dtype), [factor.to(core.dtype) for factor in wide]


def _stack(a: Tensor, b: Tensor, rank: int, is_transposed: bool) -> tuple[Tensor, list[Tensor]]:
    """PEFT's layout of a stack, A (e · q, in), expert slowest, and B (out, q · e), expert fastest."""
    experts = a.shape[0] // rank
    parts = []
    for n, (right, left) in enumerate(zip(a.split(rank), b.unflatten(1, (rank, experts)).unbind(2), strict=True)):
        one = torch.zeros(experts, 1, dtype=a.dtype)
        one[n] = 1
        parts.append((torch.eye(rank, dtype=a.dtype)[None], [one, *((right.mT, left) if is_transposed else (left, right.mT))]))
    core, factors = tucker.block_sum([(c.double(), [f.double() for f in fs]) for c, fs in parts], [1.0] * experts)
    return core.to(a.dtype), [factor.to(a.dtype) for factor in factors]


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
        **{name: getattr(config, name) for name in CARRIED},
    )
