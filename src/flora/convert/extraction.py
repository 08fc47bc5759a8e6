"""A full fine-tune as a FLoRA adapter: the difference of two checkpoints, truncated.

Tensors are read one at a time, twice: for the spectra and, once the ranks are chosen, for the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from flora import tucker
from flora.convert.adapter import PREFIX, Update, progress_bar, write_adapter
from flora.convert.checkpoint import Checkpoint
from flora.convert.difference import Change, CheckpointPair, Holders
from flora.convert.report import Rest, TruncationReport
from flora.convert.slots import Slot
from flora.convert.truncation import Candidate, Size, make_report, make_update, relative_error, save_report
from flora.files import local_path, new_folder
from flora.models import empty_model
from flora.ranks import Ranks
from flora.tuner.planning.plan import PlannedWeight, count_base_parameters


@torch.no_grad()
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    budget: int | float | None = None,
    energy: float | None = None,
    rank: int | Sequence[int] | None = None,
    keep_rest: bool = True,
    progress: bool = False,
) -> TruncationReport:
    """Write the difference of two checkpoints, tuned - base, as a FLoRA adapter.

    Every changed weight with two or more modes becomes a core space. What else changed is kept exactly and does not
    count in the budget: whole layers (norms, new heads, tied embeddings) in ``modules_to_save``, single vectors (biases
    of adapted layers) as raw parameters of rank 1. Base and adapter together then equal ``tuned``, except for the
    truncation and for the rounding to float32 (float64 if a checkpoint has it). PEFT cannot hold parameters of the
    model itself, or of a module that contains adapted layers (a ViT's class token): they are left out, and the report
    names them.

    The report compares with LoRA at as many parameters. For a plain matrix LoRA's truncated SVD is optimal: FLoRA finds
    the same subspaces and has r² more parameters for the core. FLoRA can gain for weights with more modes.

    The function is long because its arguments are documented here; every step is a function of its own.

    Args:
        base, tuned: a folder as transformers or diffusers write it, a file of weights, or a name on the hub.
        out: a new folder.
        model: the structure that the adapter will be loaded onto, with ``tuned``'s heads; the meta device is enough. By
            default the one that ``tuned``'s config describes.
        budget: parameters of all core spaces together (int), or their share of the model's (float). The ranks that keep
            the most are chosen. A weight that is not worth its parameters gets none.
        energy: the share of ‖D‖² to keep of each weight's difference D, in (0, 1]. The cheapest ranks that keep it are
            chosen.
        rank: one rank for every mode except the kernel's, or one per mode.
        keep_rest: False leaves out what no core space can hold; the report says how much of the difference that is.
        progress: show progress bars.

    Returns:
        the report, which ``out`` holds as ``extraction.json``, with a figure of the spectra and ranks in
        ``spectra.png`` if matplotlib is installed.

    Raises:
        ValueError: unless exactly one of budget, energy and rank is given; or naming checkpoint, key, shapes and what
            is accepted. Nothing is written then.
        FileExistsError: if ``out`` exists.
    """
    size = Size(budget, energy, rank)
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    pair = CheckpointPair(before, after, _structure(after) if model is None else model)
    with new_folder(out) as folder:
        changes = [change for change in progress_bar(pair.changes(), len(pair.slots), "spectra", progress) if change]
        dense, others = _split(changes, f"{base} and {tuned}")
        candidates = [Candidate(c.site, c.slot.shape, c.front) for c in dense if c.site and c.front]
        ranks = size.ranks(candidates, count_base_parameters(pair.model))
        chosen = {change.slot: own for change, own in zip(dense, ranks, strict=True) if own}
        held = pair.holders(chosen, others) if keep_rest else Holders([], [], others)
        config, weights = pair.adapter_config([c for c in dense if c.slot in chosen], held.vectors, held.layers)
        config.base_model_name_or_path = str(local_path(base) or base) if before.folder else None
        chosen |= {slot: (1,) * len(slot.shape) for slot in held.vectors}
        updates, errors = _updates(pair, weights, chosen, progress)
        kept = {f"{PREFIX}{name}": tensor for layer in held.layers for name, tensor in pair.tensors(layer).items()}
        write_adapter(folder, config, updates, kept)
        report = make_report(candidates, ranks, errors, _rest(changes, held, kept) if others else None)
        save_report(folder, "extraction.json", report)
    return report


def _structure(checkpoint: Checkpoint) -> nn.Module:
    try:
        return empty_model(checkpoint.source)
    except ValueError as error:
        raise ValueError(f"{error}; give model=, the structure that the adapter will be loaded onto") from error


def _split(changes: Sequence[Change], checkpoints: str) -> tuple[list[Change], list[Change]]:
    """The changes that a core space can hold, and all others. Raises ValueError if there are none of the former."""
    dense, others = [c for c in changes if c.front], [c for c in changes if not c.front]
    if not dense:
        besides = f"only {len(others)} others, such as {others[0].slot.name!r}" if others else "they are the same"
        raise ValueError(f"{checkpoints}: no weight of two or more modes differs, {besides}")
    return dense, others


def _updates(
    pair: CheckpointPair, weights: Sequence[PlannedWeight], ranks: dict[Slot, Ranks], progress: bool
) -> tuple[list[Update], dict[str, float]]:
    """The updates of all weights that the adapter adapts, and their relative errors by name."""
    updates, errors = [], {}
    for weight in progress_bar(weights, len(weights), "cores", progress):
        slot = pair.slots[f"{weight.module}.{weight.parameter}"]
        # a weight that PEFT adapts only because its name ends like another's gets an update of zero
        tensor = pair.difference(slot) if slot in ranks else torch.zeros(slot.shape, dtype=torch.float64)
        core, factors = tucker.truncate(tensor, ranks.get(slot, (1,) * tensor.ndim))
        updates.append(make_update(weight.site, core, factors, 1.0, pair.dtype(slot)))
        errors[weight.name] = relative_error(tensor, *updates[-1].scaled_space())
    return updates, errors


def _rest(changes: Sequence[Change], held: Holders, kept: dict[str, Tensor]) -> Rest:
    """What changed and is in no core space. ``kept``: the tensors of the layers that are saved whole."""
    total = sum(change.energy for change in changes)
    rest_share = sum(change.energy for change in changes if not change.front) / total
    left_share = sum(change.energy for change in held.left_out) / total
    return Rest(
        layers=held.layers,
        vectors=[slot.name for slot in held.vectors],
        left_out=[change.slot.name for change in held.left_out],
        parameters=sum(map(Tensor.numel, kept.values())) + sum(prod(slot.shape) for slot in held.vectors),
        kept_share=rest_share - left_share,
        left_share=left_share,
    )
