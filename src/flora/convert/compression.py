"""An adapter at smaller ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flora import tucker
from flora.convert.adapter import Adapter, progress_bar, write_adapter
from flora.convert.fronts import front_of
from flora.convert.report import TruncationReport
from flora.convert.truncation import Candidate, Size, make_report, make_update, relative_error, save_report
from flora.files import new_folder


@torch.no_grad()
def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    budget: int | float | None = None,
    energy: float | None = None,
    rank: int | Sequence[int] | None = None,
    progress: bool = False,
) -> TruncationReport:
    """Write a FLoRA adapter at smaller ranks, by Tucker rounding: no update is formed in full.

    The adapter's config and its other tensors are copied. Exactly one of budget, energy and rank is needed.

    Args:
        adapter: a folder, or a name on the hub.
        out: a new folder.
        budget: parameters of all core spaces together (int), or their share of the adapter's (float). Every weight
            keeps at least rank 1.
        energy: the share of ‖D‖² to keep of each weight's update D, in (0, 1]. The cheapest ranks that keep it are
            chosen.
        rank: one rank for every mode except the kernel's, or one per mode. No rank grows.
        progress: show progress bars.

    Returns:
        the report, which ``out`` holds as ``compression.json`` (see ``extract``).

    Raises:
        ValueError: naming the option and what is accepted, or file, key and shape. Nothing is written then.
        FileExistsError: if ``out`` exists.
    """
    size = Size(budget, energy, rank)
    source = Adapter.open(adapter)
    with new_folder(out) as folder:
        updates = list(source.updates())
        spaces = [tucker.orthonormal(*update.scaled_space()) for update in updates]
        pairs = progress_bar(zip(updates, spaces, strict=True), len(updates), "spectra", progress)
        candidates = [Candidate(u.site, u.shape, front_of(core, u.shape)) for u, (core, _) in pairs]
        ranks = size.ranks(candidates, sum(update.parameters for update in updates), each=True)
        smaller, errors = [], {}
        steps = zip(updates, spaces, ranks, strict=True)
        for update, (core, bases), own in progress_bar(steps, len(updates), "cores", progress):
            inner_core, inner_factors = tucker.truncate(core, own)
            factors = [basis @ factor for basis, factor in zip(bases, inner_factors, strict=True)]
            scale = update.scale or 1.0  # kept, for further training
            smaller.append(make_update(update.site, inner_core / scale, factors, scale, update.dtype))
            errors[update.site.name] = relative_error(core, inner_core, inner_factors)
        write_adapter(folder, source.config, smaller, source.other_tensors())
        report = make_report(candidates, ranks, errors)
        save_report(folder, "compression.json", report)
    return report
