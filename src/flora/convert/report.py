"""What a truncation kept and what it cost: plain numbers, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

from flora.ranks import Ranks, parameter_count


@dataclass(frozen=True)
class Row:
    """One weight. ``ranks`` None: it was not worth its parameters. ``norm``: ‖D‖ of its difference or update D.
    ``error``: ‖D - what was written‖ / ‖D‖. ``spectra``, ``roles``: a mode's singular values, falling, and its part."""

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

    ``layers``, ``vectors``: kept exactly, with ``parameters`` entries. ``left_out``: not kept. ``kept_share``,
    ``left_share``: of the whole difference's ‖D‖²; what is new, and buffers, are in neither.
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
class Report:
    """``rows``: every weight that could have a core space. ``lora_error``: of LoRA by truncated SVD of the same
    weights, at as many parameters. ``rest``: None where nothing else changed. ``str()`` is the table."""

    rows: list[Row]
    lora_error: float
    rest: Rest | None = None

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def error(self) -> float:
        """Of all these weights together: √(Σ ‖D - what was written‖² / Σ ‖D‖²)."""
        total = sum(row.norm**2 for row in self.rows)
        return sqrt(sum((row.error * row.norm) ** 2 for row in self.rows) / total) if total else 0.0

    @property
    def energy(self) -> float:
        return 1 - self.error**2

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without the spectra."""
        rows = [
            {name: getattr(row, name) for name in ("name", "kind", "shape", "ranks", "parameters", "norm", "error")}
            for row in self.rows
        ]
        rest = self.rest and asdict(self.rest)
        return {
            "parameters": self.parameters,
            "error": self.error,
            "lora_error": self.lora_error,
            "rest": rest,
            "weights": rows,
        }

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "ranks", "parameters", "error", "energy kept")
        lines = [
            (
                row.name,
                row.kind,
                _sizes(row.shape),
                _sizes(row.ranks) if row.ranks else "none",
                f"{row.parameters:,}",
                f"{row.error:.4f}",
                f"{row.energy:.2%}",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

        def line(cells: Iterable[str]) -> str:
            pairs = enumerate(zip(cells, widths, strict=True))
            return "  ".join(c.rjust(w) if n > 3 else c.ljust(w) for n, (c, w) in pairs).rstrip()

        adapted = sum(row.ranks is not None for row in self.rows)
        total = (
            f"{adapted} weights, {self.parameters:,} parameters: relative error {self.error:.4f}, "
            f"{self.energy:.2%} of the energy kept",
            f"LoRA (truncated SVD) at as many parameters: relative error {self.lora_error:.4f}",
        )
        rest = [str(self.rest)] if self.rest else []
        return "\n".join([line(head), line("─" * w for w in widths), *map(line, lines), "", *total, *rest])


def _sizes(numbers: Iterable[int]) -> str:
    return "×".join(map(str, numbers))
