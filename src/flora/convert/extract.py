"""A full fine-tune as a FLoRA adapter: the difference of two checkpoints, truncated; and an adapter at smaller ranks.

Tensors are read one at a time, twice: for the spectra, and, once the ranks are known, for the cores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from flora import tucker
from flora.convert.adapter import PREFIX, Adapter, Update, bar, write_adapter
from flora.convert.checkpoint import Checkpoint
from flora.convert.difference import Change, Pair
from flora.convert.report import Report, Rest, Row
from flora.convert.slots import Slot
from flora.convert.truncate import Front, front, lora_energy, spend
from flora.files import new_folder
from flora.layers.kinds import output_mode
from flora.layers.sites import Site
from flora.models import empty_model
from flora.ranks import Ranks, Weight, clip_ranks, usable_ranks
from flora.tuner.config import check_budget, check_rank, is_number
from flora.tuner.planning import count_base_parameters


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
) -> Report:
    """Write the difference of two checkpoints, tuned - base, as the FLoRA adapter ``out``.

    Every changed weight with two modes or more becomes a core space. What else changed is kept exactly, beside the
    budget: whole layers (norms, new heads, tied embeddings) in ``modules_to_save``, single vectors (biases of adapted
    layers) as raw parameters of rank 1. So base and adapter are ``tuned`` up to the truncation, and to the rounding of
    float32 unless the checkpoints are float64. PEFT can hold no parameter of the model itself, or of a module with
    adapted layers in it (a ViT's class token): these are left out, and named in the report.

    The report, saved as ``extraction.json``, compares with LoRA at as many parameters. For a plain matrix LoRA's
    truncated SVD is optimal: FLoRA finds the same subspaces and pays r² more for the core; a diagonal core would be
    LoRA with a scale too many. FLoRA can gain where a weight has more modes. Where matplotlib is installed,
    ``spectra.png`` shows the spectra and the ranks.

    Args:
        base, tuned: as ``Checkpoint.open`` takes them.
        model: the structure that the adapter will be loaded onto, with ``tuned``'s heads; the meta device is enough.
            Without it, what the config in ``tuned`` describes.
        budget: parameters of all core spaces together (int), or their share of the model's (float): the ranks that keep
            the most. A weight that is not worth its parameters gets none.
        energy: in (0, 1], the share of ‖D‖² to keep of each weight's difference D, by the cheapest ranks.
        rank: as ``FloraConfig.r``: one for every mode but the kernel's, or one per mode.
        keep_rest: False leaves out what no core space can hold; the report says how much of the difference that is.

    Raises:
        ValueError: unless one of budget, energy and rank is given; naming checkpoint, key, shapes and what is accepted.
            Nothing is written then.
        FileExistsError: where ``out`` exists.
    """
    size = Size(budget, energy, rank)
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    pair = Pair(before, after, _structure(after) if model is None else model)
    with new_folder(Path(out)) as folder:
        changes = [change for change in bar(pair.changes(), len(pair.slots), "spectra", progress) if change]
        dense, rest = [c for c in changes if c.front], [c for c in changes if not c.front]
        if not dense:
            others = f"only {len(rest)} others, such as {rest[0].slot.name!r}" if rest else "they are the same"
            raise ValueError(f"{base} and {tuned}: no weight of two or more modes differs, {others}")
        parts = [Part(c.place.name, c.place.kind.name, c.slot.shape, c.place.roles, c.front) for c in dense]
        ranks = size.ranks(parts, count_base_parameters(pair.model))
        wanted = {change.slot: own for change, own in zip(dense, ranks, strict=True) if own}
        saved, vectors, left = pair.rest(wanted, rest) if keep_rest else ([], [], rest)
        config, plan = pair.plan([c.place for c in dense if c.slot in wanted], vectors, saved)
        config.base_model_name_or_path = str(base) if before.folder else None
        wanted |= {slot: (1,) * len(slot.shape) for slot in vectors}
        updates, errors = [], {}
        for row in bar(plan, len(plan), "cores", progress):
            slot = pair.slots[f"{row.module}.{row.parameter}"]
            # what PEFT also finds by the end of a name that is wanted stays as it is
            tensor = pair.difference(slot) if slot in wanted else torch.zeros(slot.shape, dtype=torch.float64)
            core, factors = tucker.truncate(tensor, wanted.get(slot, (1,) * tensor.ndim))
            updates.append(_update(row.site, core, factors, 1.0, pair.dtype(slot)))
            errors[row.name] = _error(tensor, *updates[-1].exact())
        kept = {f"{PREFIX}{name}": tensor for module in saved for name, tensor in pair.tensors(module).items()}
        write_adapter(folder, config, updates, kept)
        report = _report(parts, ranks, errors, _rest(changes, left, saved, vectors, kept) if rest else None)
        _save(folder, "extraction.json", report)
    return report


def _structure(checkpoint: Checkpoint) -> nn.Module:
    try:
        return empty_model(checkpoint.source)
    except ValueError as error:
        raise ValueError(f"{error}; give model=, the structure that the adapter will be loaded onto") from error


def _rest(
    changes: list[Change], left: list[Change], saved: list[str], vectors: list[Slot], kept: dict[str, Tensor]
) -> Rest:
    """``left``: those of ``changes`` that are neither in a core space nor kept."""
    total = sum(change.energy for change in changes)
    rest_share = sum(change.energy for change in changes if not change.front) / total
    left_share = sum(change.energy for change in left) / total
    return Rest(
        layers=saved,
        vectors=[slot.name for slot in vectors],
        left_out=[change.slot.name for change in left],
        parameters=sum(map(Tensor.numel, kept.values())) + sum(prod(slot.shape) for slot in vectors),
        kept_share=rest_share - left_share,
        left_share=left_share,
    )


@torch.no_grad()
def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    budget: int | float | None = None,
    energy: float | None = None,
    rank: int | Sequence[int] | None = None,
    progress: bool = False,
) -> Report:
    """Write a FLoRA adapter at smaller ranks, as the adapter ``out``: Tucker rounding, which forms no update in full.
    Its config, and what else the adapter holds, are carried over.

    The report, saved as ``compression.json``, and the figure are as ``extract``'s.

    Args:
        budget: parameters of all core spaces together (int), or their share of the adapter's (float). Every weight
            keeps rank 1 at least.
        energy, rank: as ``extract``'s; no rank grows.

    Raises:
        ValueError: as ``extract`` does; and where ``adapter`` is no FLoRA adapter.
        FileExistsError: where ``out`` exists.
    """
    size = Size(budget, energy, rank)
    source = Adapter.open(adapter)
    with new_folder(Path(out)) as folder:
        updates = list(source.updates())
        spaces = [tucker.orthonormal(*update.exact()) for update in updates]
        parts = []
        for update, (core, _) in zip(updates, bar(spaces, len(spaces), "spectra", progress), strict=True):
            kind = update.site.kind
            roles = kind.roles_of(update.shape)
            parts.append(Part(update.site.name, kind.name, update.shape, roles, front(core, update.shape)))
        ranks = size.ranks(parts, sum(update.parameters for update in updates), each=True)
        rounded, errors = [], {}
        steps = zip(updates, spaces, ranks, strict=True)
        for update, (core, bases), own in bar(steps, len(updates), "cores", progress):
            small, inner = tucker.truncate(core, own)
            factors = [basis @ factor for basis, factor in zip(bases, inner, strict=True)]
            scale = update.scale or 1.0  # it stays, for the training that may follow
            rounded.append(_update(update.site, small / scale, factors, scale, update.dtype))
            errors[update.site.name] = _error(core, small, inner)
        write_adapter(folder, source.config, rounded, source.other_tensors())
        report = _report(parts, ranks, errors)
        _save(folder, "compression.json", report)
    return report


# --------------------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Part:
    """What is remembered of a weight's difference or update D until its ranks are chosen."""

    name: str
    kind: str
    shape: tuple[int, ...]
    roles: tuple[str, ...]
    front: Front


@dataclass(frozen=True)
class Size:
    """What the user asks for: exactly one of these.

    Raises:
        ValueError: naming the option, the value given and what is accepted.
    """

    budget: int | float | None
    energy: float | None
    rank: int | Sequence[int] | None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"exactly one of budget, energy and rank is needed, got {given or 'none'}")
        check_budget(self.budget)
        check_rank("rank", self.rank, none=True)
        if self.energy is not None and not (is_number(self.energy) and 0 < self.energy <= 1):
            raise ValueError(f"energy must be a number in (0, 1], got {self.energy!r}")

    def ranks(self, parts: Sequence[Part], whole: int, each: bool = False) -> list[Ranks | None]:
        """Of every part, None where it gets none, which ``each`` rules out; a budget's share is one of ``whole``."""
        if self.energy is not None:
            return [part.front.keeping(self.energy) for part in parts]
        if self.budget is not None:
            budget = self.budget if isinstance(self.budget, int) else int(self.budget * whole)
            return spend([part.front for part in parts], budget, each)
        ranks = []
        for part in parts:
            most = tuple(map(len, part.front.spectra))
            try:
                ranks.append(usable_ranks(clip_ranks(Weight(most, part.roles), self.rank, None)))
            except ValueError as error:
                raise ValueError(f"layer {part.name!r}: {error}") from None
        return ranks


# -------------------------------------------------------------------------------------------------------- what came out


def _update(site: Site, core: Tensor, factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Update:
    return Update(site, core.to(dtype), tuple(factor.to(dtype) for factor in factors), scale)


def _error(tensor: Tensor, core: Tensor, factors: Sequence[Tensor]) -> float:
    """‖tensor - core ×_1 factors[0] …‖ / ‖tensor‖."""
    norm = torch.linalg.vector_norm(tensor)
    return (torch.linalg.vector_norm(tucker.add_tucker(tensor, -core, factors)) / norm).item() if norm else 0.0


def _report(
    parts: Sequence[Part], ranks: Sequence[Ranks | None], errors: dict[str, float], rest: Rest | None = None
) -> Report:
    rows = [
        Row(p.name, p.kind, p.shape, own, sqrt(p.front.total), errors.get(p.name, 1.0), p.front.spectra, p.roles)
        for p, own in zip(parts, ranks, strict=True)
    ]
    outputs = [output_mode(part.roles) for part in parts]
    spectra = [part.front.spectra[mode] for part, mode in zip(parts, outputs, strict=True)]
    costs = [part.shape[mode] + prod(part.shape) // part.shape[mode] for part, mode in zip(parts, outputs, strict=True)]
    total = sum(part.front.total for part in parts)
    kept = lora_energy(spectra, costs, sum(row.parameters for row in rows))
    return Report(rows, sqrt(max(0.0, 1 - kept / total)) if total else 0.0, rest)


def _save(folder: Path, name: str, report: Report) -> None:
    (folder / name).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if find_spec("matplotlib"):
        from flora.convert.figures import spectra

        spectra(report, folder / "spectra.png")
