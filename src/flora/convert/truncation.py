"""What ``extract`` and ``compress`` share: the size that the user asks for, the ranks, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from flora import tucker
from flora.convert.adapter import Update
from flora.convert.fronts import Front, lora_energy, spend
from flora.convert.report import Rest, TruncatedWeight, TruncationReport
from flora.layers.kinds import output_mode
from flora.layers.sites import Site
from flora.ranks import Ranks, Weight, clip_ranks, usable_ranks
from flora.tuner.checks import check_budget, check_rank, is_number


@dataclass(frozen=True)
class Candidate:
    """A weight that may get a core space: all that is kept of its difference or update until the ranks are chosen."""

    site: Site
    shape: tuple[int, ...]
    front: Front

    @property
    def roles(self) -> tuple[str, ...]:
        return self.site.kind.roles_of(self.shape)


@dataclass(frozen=True)
class Size:
    """The size that the user asks for: exactly one of ``budget``, ``energy`` and ``rank``.

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

    def ranks(self, candidates: Sequence[Candidate], whole: int, each: bool = False) -> list[Ranks | None]:
        """The ranks of every candidate; None if it gets no core space.

        Args:
            whole: the number of parameters of which a budget may be a share.
            each: every candidate must get a core space.
        """
        if self.rank is not None:
            return [_clipped(candidate, self.rank) for candidate in candidates]
        if self.energy is not None:
            return [candidate.front.keeping(self.energy) for candidate in candidates]
        budget = int(self.budget * whole) if isinstance(self.budget, float) else self.budget
        return spend([candidate.front for candidate in candidates], budget or 0, each)


def _clipped(candidate: Candidate, rank: int | Sequence[int]) -> Ranks:
    largest = tuple(map(len, candidate.front.spectra))
    try:
        return usable_ranks(clip_ranks(Weight(largest, candidate.roles), rank, None))
    except ValueError as error:
        raise ValueError(f"layer {candidate.site.name!r}: {error}") from None


def make_update(site: Site, core: Tensor, factors: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Update:
    """The update with core and factors rounded to ``dtype``."""
    return Update(site, core.to(dtype), tuple(factor.to(dtype) for factor in factors), scale)


def relative_error(tensor: Tensor, core: Tensor, factors: Sequence[Tensor]) -> float:
    """‖tensor - core ×_1 factors[0] …‖ / ‖tensor‖."""
    norm = torch.linalg.vector_norm(tensor)
    return (torch.linalg.vector_norm(tucker.add_tucker(tensor, -core, factors)) / norm).item() if norm else 0.0


def make_report(
    candidates: Sequence[Candidate], ranks: Sequence[Ranks | None], errors: dict[str, float], rest: Rest | None = None
) -> TruncationReport:
    """The report of a truncation, with the error of LoRA at as many parameters.

    Args:
        candidates, ranks: the weights, and what each got.
        errors: relative errors by the weights' names. A weight without ranks has error 1.
        rest: what else changed.
    """
    rows = [
        TruncatedWeight(
            name=candidate.site.name,
            kind=candidate.site.kind.name,
            shape=candidate.shape,
            ranks=own,
            norm=sqrt(candidate.front.total),
            error=errors.get(candidate.site.name, 1.0),
            spectra=candidate.front.spectra,
            roles=candidate.roles,
        )
        for candidate, own in zip(candidates, ranks, strict=True)
    ]
    outputs = [output_mode(row.roles) for row in rows]
    spectra = [row.spectra[mode] for row, mode in zip(rows, outputs, strict=True)]
    costs = [row.shape[mode] + prod(row.shape) // row.shape[mode] for row, mode in zip(rows, outputs, strict=True)]
    total = sum(candidate.front.total for candidate in candidates)
    kept = lora_energy(spectra, costs, sum(row.parameters for row in rows))
    return TruncationReport(rows, sqrt(max(0.0, 1 - kept / total)) if total else 0.0, rest)


def save_report(folder: Path, name: str, report: TruncationReport) -> None:
    """Write the report as JSON and, if matplotlib is installed, the figure ``spectra.png``."""
    (folder / name).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if find_spec("matplotlib"):
        from flora.convert.figures import plot_spectra

        plot_spectra(report, folder / "spectra.png")
