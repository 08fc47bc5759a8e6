"""What a truncation kept, and at which cost: plain numbers, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

from flora.ranks import Ranks, parameter_count
from flora.text import sizes, table


@dataclass(frozen=True)
class TruncatedWeight:
    """One weight of a ``TruncationReport``. D is its difference or its update.

    Args:
        name: its name in an adapter.
        kind: the name of its kind of layer.
        shape: (I_1, …, I_N).
        ranks: (r_1, …, r_N); None if it was not worth its parameters.
        norm: ‖D‖.
        error: ‖D - written update‖ / ‖D‖.
        spectra: the singular values of every mode's unfolding of D, in descending order.
        roles: the role of every mode: "out", "in", "kernel" or "other".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: Ranks | None
    norm: float
    error: float
    spectra: list[list[float]] = field(repr=False)
    roles: tuple[str, ...] = field(repr=False)

    @property
    def parameters(self) -> int:
        return parameter_count(self.shape, self.ranks) if self.ranks else 0

    @property
    def energy(self) -> float:
        """The share of ‖D‖² that is kept."""
        return 1 - self.error**2


@dataclass(frozen=True)
class Rest:
    """What changed and is in no core space.

    Args:
        layers: layers that are kept whole.
        vectors: vectors that are kept exactly, as raw parameters of rank 1.
        left_out: weights and buffers that are not kept.
        parameters: number of entries of ``layers`` and ``vectors``.
        kept_share, left_share: shares of the whole difference's ‖D‖². New weights and buffers count in neither.
    """

    layers: list[str]
    vectors: list[str]
    left_out: list[str]
    parameters: int
    kept_share: float
    left_share: float

    def __str__(self) -> str:
        lines = []
        if self.parameters:
            what = f"{len(self.layers)} layers and {len(self.vectors)} vectors, {self.parameters:,} parameters"
            lines.append(f"kept exactly: {what}, {self.kept_share:.2%} of the difference's energy")
        if self.left_out:
            names = ", ".join(self.left_out[:5]) + (", …" if len(self.left_out) > 5 else "")
            lines.append(f"left out: {len(self.left_out)} ({names}), {self.left_share:.2%} of the difference's energy")
        return "\n".join(lines)


@dataclass(frozen=True)
class TruncationReport:
    """What ``extract`` or ``compress`` wrote. ``str()`` is the table.

    Args:
        rows: every weight that could have a core space.
        lora_error: the error of LoRA on the same weights, by truncated SVD, at as many parameters.
        rest: what changed besides; None if nothing did.
    """

    rows: list[TruncatedWeight]
    lora_error: float
    rest: Rest | None = None

    @property
    def parameters(self) -> int:
        """Parameters of all core spaces together."""
        return sum(row.parameters for row in self.rows)

    @property
    def error(self) -> float:
        """Over all rows: √(Σ ‖D - written update‖² / Σ ‖D‖²)."""
        total = sum(row.norm**2 for row in self.rows)
        return sqrt(sum((row.error * row.norm) ** 2 for row in self.rows) / total) if total else 0.0

    @property
    def energy(self) -> float:
        """The share of Σ ‖D‖² that is kept."""
        return 1 - self.error**2

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the spectra."""
        keys = ("name", "kind", "shape", "ranks", "parameters", "norm", "error")
        return {
            "parameters": self.parameters,
            "error": self.error,
            "lora_error": self.lora_error,
            "rest": self.rest and asdict(self.rest),
            "weights": [{key: getattr(row, key) for key in keys} for row in self.rows],
        }

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "ranks", "parameters", "error", "energy kept")
        lines = [
            (
                row.name,
                row.kind,
                sizes(row.shape),
                sizes(row.ranks) if row.ranks else "none",
                f"{row.parameters:,}",
                f"{row.error:.4f}",
                f"{row.energy:.2%}",
            )
            for row in self.rows
        ]
        adapted = sum(row.ranks is not None for row in self.rows)
        total = (
            f"{adapted} weights, {self.parameters:,} parameters: relative error {self.error:.4f}, "
            f"{self.energy:.2%} of the energy kept",
            f"LoRA (truncated SVD) at as many parameters: relative error {self.lora_error:.4f}",
        )
        rest = [str(self.rest)] if self.rest else []
        return "\n".join([table(head, lines, right=head[4:]), "", *total, *rest])
