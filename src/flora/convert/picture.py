"""What an adapter has learned, weight by weight: of a FLoRA adapter, a PEFT LoRA or a LoCon file. No model is needed.

With orthonormal bases of the factors, A⁽ⁿ⁾ = Q⁽ⁿ⁾ R⁽ⁿ⁾, the update is s · G ×₁ R⁽¹⁾ … in these bases. Norm and singular
values of this small tensor are those of the update.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flora import tucker
from flora.convert.adapter import Adapter, adapter_folder, read_config
from flora.convert.locon import ALPHA, DOWN, MID, UP
from flora.convert.locon_import import check_ends, scale_of
from flora.convert.lora_import import import_lora
from flora.convert.products import from_product, keys_by_layer
from flora.files import open_tensors, user_path
from flora.page import Row, page
from flora.text import sizes, table

KEPT = 0.99  # of the squared norm, for the rank that matters
BARS = " ▁▂▃▄▅▆▇█"
DRAWN = 16  # singular values


@dataclass(frozen=True)
class ShownWeight:
    """One weight's update D.

    Args:
        name, kind: of the weight and of its kind of layer.
        shape: (I_1, …, I_N).
        ranks: (r_1, …, r_N).
        norm: ‖D‖.
        spectrum: the singular values of D's unfolding along its first mode, in descending order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    norm: float
    spectrum: tuple[float, ...] = field(repr=False)

    @property
    def rank_in_use(self) -> int:
        """The number of singular values that keep 99 % of ‖D‖²."""
        total, kept = sum(value**2 for value in self.spectrum), 0.0
        for n, value in enumerate(self.spectrum):
            if kept >= KEPT * total:
                return n
            kept += value**2
        return len(self.spectrum)


@dataclass(frozen=True)
class Shown:
    """What ``show`` found: ``weights``, the largest norm first. ``str()`` is the table, ``html()`` the page."""

    source: str
    form: str
    weights: list[ShownWeight]

    def share(self, weight: ShownWeight) -> float:
        """The weight's part of the squared norm of all updates."""
        total = sum(one.norm**2 for one in self.weights)
        return weight.norm**2 / total if total else 0.0

    @property
    def summary(self) -> str:
        """One line on all weights together."""
        half, kept = 0, 0.0
        while half < len(self.weights) and kept < 0.5:
            kept, half = kept + self.share(self.weights[half]), half + 1
        norm = sum(one.norm**2 for one in self.weights) ** 0.5
        return (
            f"{self.form}, {len(self.weights)} weights, norm {norm:.4g}; {half} of them have half of its square"
            if norm
            else f"{self.form}, {len(self.weights)} weights, all updates are zero"
        )

    def lines(self, most: int | None = None) -> str:
        """The table of the first ``most`` weights, and the summary."""
        head = ("weight", "kind", "shape", "ranks", "norm", "share", "in use", "spectrum")
        rows = [
            (
                one.name, one.kind, sizes(one.shape), sizes(one.ranks), f"{one.norm:.3g}", f"{self.share(one):.1%}",
                f"{one.rank_in_use} of {len(one.spectrum)}", _bars(one.spectrum),
            )
            for one in self.weights[:most]
        ]  # fmt: skip
        hidden = len(self.weights) - len(rows)
        more = [f"{hidden} weights more, each smaller"] if hidden else []
        return "\n".join([table(head, rows, right=["norm", "share", "in use"]), "", *more, self.summary])

    def __str__(self) -> str:
        return self.lines()

    def html(self) -> str:
        """The page, which needs nothing else."""
        rows = [
            Row(
                one.name,
                one.kind,
                (sizes(one.shape), sizes(one.ranks), f"{one.norm:.3g}", f"{one.rank_in_use} of {len(one.spectrum)}"),
                self.share(one),
                one.spectrum[: 2 * DRAWN],
            )
            for one in self.weights
        ]
        head = ("shape", "ranks", "norm", "ranks in use")
        return page(self.source, self.summary, head, "share of the squared norm", rows)


def _bars(values: tuple[float, ...]) -> str:
    drawn = values[:DRAWN]
    return "".join(BARS[round((len(BARS) - 1) * value / drawn[0])] if drawn[0] else BARS[0] for value in drawn)


def show(adapter: str | Path) -> Shown:
    """What an adapter has learned: norms, spectra and the layers that matter.

    Args:
        adapter: a FLoRA adapter or a PEFT LoRA, a folder or a name on the hub; or a LoCon file of LyCORIS or kohya.

    Raises:
        ValueError: if it is none of them, or its numbers are not finite.
    """
    path = user_path(adapter)
    if path.is_file():
        form, updates = "LoCon", _of_locon(path)
        weights = [_shown(*update) for update in updates]
    else:
        folder = adapter_folder(adapter)
        form = {"FLORA": "FLoRA", "LORA": "LoRA"}[read_config(folder, "FLORA", "LORA")["peft_type"]]
        if form == "FLoRA":
            weights = [_shown(*update) for update in _of_flora(folder)]
        else:
            with tempfile.TemporaryDirectory() as scratch:
                import_lora(folder, Path(scratch, "adapter"))
                weights = [_shown(*update) for update in _of_flora(Path(scratch, "adapter"))]
    return Shown(str(adapter), form, sorted(weights, key=lambda one: -one.norm))


Parts = tuple[str, str, tuple[int, ...], Tensor, list[Tensor]]  # name, kind, ranks, the scaled core, the factors


def _of_flora(folder: Path) -> Iterator[Parts]:
    for update in Adapter.open(folder).updates():
        core, factors = update.scaled_space()
        yield update.site.name, update.site.kind.name, update.ranks, core, factors


def _of_locon(path: Path) -> Iterator[Parts]:
    with open_tensors(path) as file:
        for name, keys in keys_by_layer(file.keys()).items():
            check_ends(path, name, keys)
            tensors = {end: file.get_tensor(key).double() for end, key in keys.items()}
            scale = scale_of(tensors.get(ALPHA), tensors[DOWN].shape[0])
            up, down = tensors[UP].flatten(1), tensors[DOWN]
            if MID in tensors:
                core = tensors[MID]
                kernel = [torch.eye(size, dtype=core.dtype) for size in core.shape[2:]]
                yield name, "Tucker", tuple(core.shape), scale * core, [up, down.flatten(1).mT, *kernel]
            else:
                core, factors = from_product(up, down)
                yield name, "product", (up.shape[1],), scale * core, factors


def _shown(name: str, kind: str, ranks: tuple[int, ...], core: Tensor, factors: list[Tensor]) -> ShownWeight:
    shape = tuple(factor.shape[0] for factor in factors)
    small = tucker.reconstruct(core, [torch.linalg.qr(factor).R for factor in factors])
    spectrum = torch.linalg.svdvals(tucker.unfold(small, 0))
    norm = torch.linalg.vector_norm(small).item()
    if not torch.isfinite(spectrum).all():
        raise ValueError(f"layer {name!r}, shape {list(shape)}: its update is not finite")
    return ShownWeight(name, kind, shape, ranks, norm, tuple(spectrum.tolist()))
