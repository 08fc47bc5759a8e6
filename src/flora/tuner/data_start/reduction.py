"""From tensors that say how a weight will be used to its start, streamed: the part that all data starts share.

Each adapted weight has a tensor D (I_1, …, I_N): the gradient of a loss, or random sums of the layer's inputs. HOSVD of
D gives the factors of all modes but the output mode o; the leading right singular vectors of the projected D's output
unfolding are the rows of the core; the output factor is zero, so that no output changes.

D itself is never kept. Two passes over the batches reduce it as its parts arrive (randomized SVD: Halko, Martinsson and
Tropp, 2011). The first finds, for every long mode, a basis Qₙ a few times wider than the rank. The second sums
B = D ×ₙ Qₙᵀ over n ≠ o, and HOSVD of the small B does the rest. A mode no longer than its basis would be keeps Qₙ = 1,
so small layers are exact and take one pass. The parts of a linear layer's D are not even formed. They are products of
inputs and of numbers at the outputs, and a thin basis is multiplied with one of the two first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flora import tucker
from flora.layers.execution.cost import LOW_PRECISION
from flora.layers.kinds import output_mode
from flora.layers.starts import fill_core
from flora.layers.weights.sharded import has_engine, is_distributed, part_like, whole
from flora.tuner.layer import FloraLayer

Factors = list[Tensor | None]  # None for the output mode
Start = tuple[Tensor, Factors]  # rows of the core's output unfolding, and factors

BASIS = 4  # columns of a basis per rank
SPARE = 32  # extra columns of a basis


class Products(NamedTuple):
    """A summand of a linear layer's D that is not formed: outer products of ``output`` (positions, out) and ``input``
    (positions, in), summed over the positions."""

    output: Tensor
    input: Tensor

    @classmethod
    def of(cls, output: Tensor, x: Tensor) -> Products:
        """Of numbers at a layer's output (…, out), and its input (…, in)."""
        dtype = torch.promote_types(torch.promote_types(output.dtype, x.dtype), torch.float32)
        return cls(*(part.detach().reshape(-1, part.shape[-1]).to(dtype) for part in (output, x)))

    @staticmethod
    def suit(layer: FloraLayer) -> bool:
        """Whether a layer's D is such a sum: it computes as its class does, and sees whole inputs and outputs."""
        linear = layer.kind.is_matrix and layer.kind.can_factor(layer.get_base_layer())
        return linear and (layer.is_quantized or not is_distributed(layer.base_parameter))


class Reduction:
    """The D of one weight, reduced to the sums that its start needs.

    Args:
        layer: whose weight (I_1, …, I_N) it is.
        seed: of all random numbers; the same on every process.
        source: what D is, for messages.
        missing: the message for a layer whose D never came, with ``{layer}`` in it.
        rows: size of D's output mode, if it is not the weight's.
        share: the share of each rank that follows D. The rest is random, orthogonal to it.
    """

    def __init__(
        self,
        layer: FloraLayer,
        adapter: str,
        seed: int,
        source: str,
        missing: str,
        rows: int | None = None,
        share: float = 1.0,
    ) -> None:
        self.like = layer.space(adapter).core
        self.layer, self.seed, self.source, self.missing, self.share = layer, seed, source, missing, share
        self.ranks, self.output_mode = layer.space(adapter).ranks, output_mode(layer.roles)
        self.shape = list(layer.weight_shape)
        self.shape[self.output_mode] = rows or self.shape[self.output_mode]
        self.bases: Factors = [None] * len(self.ranks)
        self.sums: dict[int, Tensor] = {}  # by mode in the first pass; in the second B, under -1
        wide = {n: BASIS * rank + SPARE for n, rank in enumerate(self.ranks) if n != self.output_mode}
        self.widths = {n: width for n, width in wide.items() if width < layer.weight_shape[n]}
        self.needs_bases = bool(self.widths)
        self.is_zero = False  # whether D says nothing, so that the start is random

    @torch.no_grad()
    def add(self, part: Tensor | Products) -> None:
        """Add a summand of D."""
        if isinstance(part, Products):
            self._add_products(part)
            return
        part = whole(part)
        part = part.to_dense() if part.is_sparse else part
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        if self.needs_bases:
            for mode, width in self.widths.items():
                rows = tucker.unfold(part, mode)
                self._add(mode, rows @ self._random(mode, rows.shape[1], width, rows))
        else:
            self._add(-1, tucker.project(part, self._bases(part)))

    def _add_products(self, part: Products) -> None:
        mode = 1 - self.output_mode
        if self.needs_bases:
            random = self._random(mode, part.output.shape[1], self.widths[mode], part.output)
            self._add(mode, part.input.mT @ (part.output @ random))
        else:
            basis = self._bases(part.input)[mode]
            inputs = part.input if basis is None else part.input @ basis
            self._add(-1, part.output.mT @ inputs if mode else inputs.mT @ part.output)

    def _bases(self, like: Tensor) -> Factors:
        return [None if basis is None else basis.to(like.dtype) for basis in self.bases]

    def _add(self, key: int, term: Tensor) -> None:
        self.sums[key] = term if key not in self.sums else self.sums[key].add_(term)

    def _random(self, key: int, rows: int, columns: int, like: Tensor) -> Tensor:
        """Random numbers, the same for every batch and process."""
        generator = torch.Generator().manual_seed(self.seed + key)
        return torch.randn(rows, columns, generator=generator).to(like.device, like.dtype)

    def find_bases(self) -> None:
        """End the first pass. A basis is kept in the weight's precision, which no part of D exceeds."""
        kept = self.layer.base_parameter.dtype
        for mode in self.widths:
            basis = torch.linalg.qr(self._sum(mode)).Q
            self.bases[mode] = basis.to(kept) if kept in LOW_PRECISION else basis
            self.sums.pop(mode, None)
        self.needs_bases = False

    def _sum(self, key: int) -> Tensor:
        """The mean of a sum over all processes. Some may have seen nothing of the layer, but not all."""
        total, like = self.sums.get(key), self.like
        (seen,) = averaged([torch.tensor(float(total is not None), device=like.device)])
        if not seen:
            raise ValueError(self.missing.format(layer=repr(self.layer.name)))
        if total is None:
            total = torch.zeros(self._shape_of_sum(key), dtype=torch.promote_types(like.dtype, torch.float32))
            total = total.to(like.device)
        averaged([total])
        if not torch.isfinite(total).all():
            raise ValueError(
                f"layer {self.layer.name!r}: {self.source} of shape {list(self.layer.weight_shape)} is not finite"
            )
        return total

    def _shape_of_sum(self, key: int) -> tuple[int, ...]:
        if key >= 0:
            return self.shape[key], self.widths[key]
        return tuple(self.widths.get(mode, size) for mode, size in enumerate(self.shape))

    def start(self) -> Start:
        """Orthonormal rows of the core's output unfolding, and factors with orthonormal columns: the sizes of every
        start (``layers.starts``). What it came from is gone then, because all layers' sums are large."""
        small = self._sum(-1)
        self.is_zero = not small.any()
        bases, self.sums, self.bases = self._bases(small), {}, []
        try:
            return self._decomposed(small, bases)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"layer {self.layer.name!r}: {self.source} of shape {list(self.layer.weight_shape)} has numbers up to "
                f"{small.abs().max():.1g}, too large to decompose; for a gradient a smaller warmup_rate may help"
            ) from error

    def _decomposed(self, small: Tensor, bases: Factors) -> Start:
        factors: Factors = [None] * len(self.ranks)
        inner: Factors = [None] * len(self.ranks)
        for mode, (rank, basis) in enumerate(zip(self.ranks, bases, strict=True)):
            if mode != self.output_mode:
                factor = self._directions(mode, tucker.unfold(small, mode), rank, basis)
                factors[mode], inner[mode] = factor, factor if basis is None else basis.mT @ factor
        unfolded = tucker.unfold(tucker.project(small, inner), self.output_mode)
        rank, width = self.ranks[self.output_mode], unfolded.shape[1]
        if rank <= width:
            return self._directions(self.output_mode, unfolded.mT, rank).mT, factors
        # the input modes tell no more directions apart: all of them, each spread over the rows
        return torch.linalg.qr(self._random(8 + self.output_mode, rank, width, unfolded)).Q, factors

    def _directions(self, mode: int, matrix: Tensor, rank: int, basis: Tensor | None = None) -> Tensor:
        """Orthonormal columns (I, rank): a share of the leading left singular vectors of ``basis · matrix``, completed
        at random. So is what a matrix of lower rank says nothing about."""
        size = (matrix if basis is None else basis).shape[0]
        leading = tucker.leading_vectors(matrix, rank if rank == size else math.ceil(self.share * rank))
        lengths = torch.linalg.vector_norm(leading.mT @ matrix, dim=1)
        leading = leading[:, lengths > torch.finfo(matrix.dtype).eps * max(matrix.shape) * lengths.max()]
        leading = leading if basis is None else basis @ leading
        more = self._random(8 + mode, size, rank - leading.shape[1], matrix)
        return torch.linalg.qr(torch.cat([leading, more], 1)).Q


def two_passes(reductions: Sequence[Reduction], run: Callable[[], None]) -> list[Start]:
    """The start of every layer. ``run`` feeds the reductions all batches."""
    if any(reduction.needs_bases for reduction in reductions):
        with together():
            run()
        for reduction in reductions:
            reduction.find_bases()
    with together():
        run()
    starts = [reduction.start() for reduction in reductions]
    if zero := [repr(reduction.layer.name) for reduction in reductions if reduction.is_zero]:
        more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
        source = reductions[0].source
        warnings.warn(
            f"these layers start at random, because {source} is zero: {', '.join(zero[:3])}{more}", stacklevel=2
        )
    return starts


@torch.no_grad()
def fill(layer: FloraLayer, adapter: str, rows: Tensor, factors: Factors) -> None:
    """Start a core space as ``Reduction.start`` says."""
    space = layer.space(adapter)
    fill_core(space, rows, output_mode(layer.roles))
    for target, source in zip(space.factors, factors, strict=True):
        if source is None:
            target.zero_()
        else:
            target.copy_(part_like(source.to(target.dtype), target))


def averaged(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors, in place the mean over the processes of a distributed run."""
    if distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
    return tensors


@contextmanager
def together() -> Iterator[None]:
    """An error in one process becomes an error in all. Otherwise the others would wait for ever."""
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    if distributed():
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, None if error is None else str(error))
        for process, text in enumerate(texts):
            if error is None and text is not None:
                error = ValueError(f"process {process}: {text}")
    if error is not None:
        raise error


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    numbers = [number]
    if distributed():
        numbers = [0] * dist.get_world_size()
        dist.all_gather_object(numbers, number)
    return max(numbers)


def distributed() -> bool:
    """Whether there are several processes."""
    return has_engine() and dist.get_world_size() > 1
