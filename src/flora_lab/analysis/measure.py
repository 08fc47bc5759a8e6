"""What is measured of a model's updates ΔW, for every method: size, amplification, spectra. No matplotlib."""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from flora.layers.core_space import CoreSpace
from flora.tucker import project, unfold

# Singular values of an unfolding count towards its rank above this share of the largest. An update of rank r that was
# computed in float32 has rounding errors of about 1e-7 beyond its rank; a Gram matrix in float64 resolves 1e-8.
TOLERANCE = 1e-5
SKETCH = 64  # columns of the random sketch; it gives the range of any unfolding of lower rank exactly
POINTS = 32  # per spectrum

Weights = Mapping[str, Tensor]


def deltas(model: nn.Module, base: Weights | None = None) -> dict[str, Tensor]:
    """Every update ΔW (I_1, …, I_N), in float64, by the name of its weight in the base model.

    Covers the active adapters of all PEFT tuners (for those that rescale the weight, such as DoRA, ΔW is the adapted
    weight minus the base weight), LyCORIS modules, and weights that are trained directly. For the latter, and for
    adapters whose start changes the base model, such as PiSSA, ``base`` holds the weights before that, without the
    head's. BitFit and bottleneck adapters have no updates: they change no weight. The update of a layer with values
    that are not finite is NaN.

    Raises ValueError if an adapter is merged.
    """
    return {name: delta for name, delta, _ in updates(model, base)}


@torch.no_grad()
def updates(model: nn.Module, base: Weights | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``deltas`` one by one: (name, ΔW, W), with ΔW and the weight W that it changes in float64, (I_1, …, I_N)."""
    inside = ()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not (inside and path.startswith(inside)):
            inside = f"{path}."
            yield from _tuner_updates(path.removeprefix("base_model.model."), module, base or {})
    names = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        if hasattr(module, "get_diff_weight") and hasattr(module, "org_module"):  # LyCORIS
            weight = module.org_weight
            path = names.get(id(module.org_module[0]), module.lora_name)
            yield f"{path}.weight", _wide(module.get_diff_weight(shape=weight.shape)[0]), _wide(weight)
    for name, parameter in model.named_parameters():
        if base and name in base and parameter.requires_grad and parameter.ndim > 1:
            before = _wide(base[name]).to(_wide(parameter).device)
            yield name, _wide(parameter) - before, before


def _tuner_updates(path: str, layer: BaseTunerLayer, base: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Found by merging a copy in float64, so that it does not matter whether a method adds, rescales or rotates."""
    if layer.merged:
        raise ValueError(f"layer {path!r} is merged: unmerge it, so that its update can be told from its weight")
    layer = copy.deepcopy(layer)
    if any(parameter.is_mps for parameter in layer.parameters()):  # MPS has no float64
        layer.cpu()
    layer.double()
    tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    adapted = {getattr(tuner, "parameter_name", "weight") for tuner in tuners}
    before = {name: p.detach().clone() for name, p in layer.get_base_layer().named_parameters() if p.ndim > 1}
    whole = all(p.isfinite().all() for p in layer.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's attention has merged its output projection already
        for tuner in tuners if whole else ():
            tuner.merge()
    for name, weight in before.items():
        merged = attrgetter(name)(layer.get_base_layer())  # PEFT's attention turns its parameters into plain tensors
        if name in adapted or not torch.equal(weight, merged):
            full = f"{path}.{name.replace('base_layer.', '')}"
            weight = base[full].to(weight) if full in base else weight
            yield full, merged.detach() - weight if whole else weight * math.nan, weight


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu" if tensor.is_mps else tensor.device, torch.float64)


@torch.no_grad()
def amplification(delta: Tensor, weight: Tensor) -> float:
    """Feature amplification factor of an update, both (I_1, …, I_N): ‖ΔW‖_F / ‖W ×₁ U₁ᵀ … ×_N U_Nᵀ‖_F.

    U_n is an orthonormal basis of the range of ΔW's mode-n unfolding, whose numerical rank follows from ``TOLERANCE``.
    For a matrix, U_1 and U_2 are the singular vectors, and the factor is the paper's ‖ΔW‖_F / ‖Uᵀ W V‖_F (section
    6.2.2, after Hu et al.). 0 if ΔW is zero, NaN if it is not finite, inf if W is zero in those directions.
    """
    delta, weight = _wide(delta), _wide(weight)
    norm = delta.norm().item()
    if norm == 0 or not math.isfinite(norm):
        return norm
    # Projecting one mode on its range does not change the ranges of the others, and makes the tensor smaller.
    for mode in sorted(range(delta.ndim), key=lambda n: delta.shape[n]):
        basis = _range(unfold(delta, mode))
        if basis is not None:
            factors = [basis if n == mode else None for n in range(delta.ndim)]
            delta, weight = project(delta, factors), project(weight, factors)
    size = weight.norm().item()
    return norm / size if size else math.inf


def _range(matrix: Tensor) -> Tensor | None:
    """Orthonormal basis (I, rank) of the numerical range of ``matrix`` (I, J); None if that is the whole space."""
    if min(matrix.shape) > 4 * SKETCH:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(matrix.shape[1], SKETCH, generator=generator, dtype=matrix.dtype)
        sketch = torch.linalg.qr(matrix @ random.to(matrix.device)).Q
        seen = sketch.mT @ matrix
        # By Pythagoras, what the sketch misses. If that is rounding, measured by a lower bound of the largest singular
        # value, then the rank is not higher than the sketch's.
        missed = matrix.norm() ** 2 - seen.norm() ** 2
        if missed <= TOLERANCE**2 * seen.norm() ** 2 / SKETCH:
            inner = _range(seen)
            return sketch if inner is None else sketch @ inner
    rows, columns = matrix.shape
    gram = matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > TOLERANCE**2 * squares[-1]
    if rows <= columns:
        return None if kept.all() else vectors[:, kept]
    return matrix @ (vectors[:, kept] / squares[kept].sqrt())


class Norms(TrainerCallback, ExportableState):
    """Records how updates grow (paper, Fig. 4): ``records`` of [step, mean ‖ΔW‖_F, mean amplification].

    The means are over all updates; amplifications that are not finite are left out. Measures about ``points`` times,
    more often early in the training (step k² of n²), and at the end. ``base``: see ``deltas``.
    ``seconds`` is the time spent on measuring, to be subtracted from the training's. The Trainer saves both in its
    checkpoints, and a resumed training continues them.
    """

    def __init__(self, points: int = 20, base: Weights | None = None) -> None:
        if points < 1:
            raise ValueError(f"points={points}: expected 1 or more")
        self.points = points
        self.base = base
        self.records: list[list[float]] = []
        self.seconds = 0.0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"rows": self.records, "seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and (saved := state.stateful_callbacks.get("Norms")):  # resumed from a checkpoint
            self.records, self.seconds = saved["attributes"]["rows"], saved["attributes"]["seconds"]
        self._steps = {1, *(-(-state.max_steps * k**2 // self.points**2) for k in range(1, self.points + 1))}

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in self._steps:
            self._record(state, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        if not self.records or self.records[-1][0] != state.global_step:  # stopped early
            self._record(state, model)

    def _record(self, state, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        started = time.perf_counter()
        numbers = [
            (delta.norm().item(), amplification(delta, weight)) for _, delta, weight in updates(model, self.base)
        ]
        if numbers:
            sizes, factors = zip(*numbers, strict=True)
            self.records.append([state.global_step, _mean(sizes), _mean([f for f in factors if math.isfinite(f)])])
        self.seconds += time.perf_counter() - started


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


@torch.no_grad()
def spectra(model: nn.Module, base: Weights | None = None) -> dict[str, list[float]]:
    """Singular values relative to the largest, at most ``POINTS``, as means over weights and modes.

    "delta": the leading singular values of each update's unfoldings along its two longest modes (for a matrix, its
    singular values), see ``_mean_spectrum``. "core": those of the unfoldings of FLoRA's cores; since ranks differ,
    point i of n is the value at i / (n - 1) of the way from the first to the last. A key without values is left out.
    """
    updated, cores = [], []
    for _, delta, _ in updates(model, base):
        longest = sorted(range(delta.ndim), key=lambda n: -delta.shape[n])[: 1 if delta.ndim == 2 else 2]
        updated += [_singular_values(unfold(delta, mode)).cpu() for mode in longest]
    for space in model.modules():
        if isinstance(space, CoreSpace):
            unfoldings = [unfold(_wide(space.core), mode) for mode, rank in enumerate(space.ranks) if rank > 1]
            cores += [_quantiles(_singular_values(matrix)).cpu() for matrix in unfoldings]
    means = {"delta": updated and _mean_spectrum(updated), "core": cores and torch.stack(cores).mean(0)}
    return {name: mean.tolist() for name, mean in means.items() if len(mean)}


def _mean_spectrum(spectra: Sequence[Tensor]) -> Tensor:
    """The first R values, as the mean over the spectra of rank R or more, where R is the median rank, or ``POINTS``.

    A mean over all of them would fall off a cliff where the lower ranks end, which is in no spectrum.
    """
    ranks = [max(1, int((~(values <= TOLERANCE)).sum())) for values in spectra]  # values that are NaN count
    rank = min(POINTS, statistics.median_high(ranks))
    return torch.stack([values[:rank] for values, own in zip(spectra, ranks, strict=True) if own >= rank]).mean(0)


def _singular_values(matrix: Tensor) -> Tensor:
    """Descending, relative to the largest; zeros for a zero matrix, NaN for one with values that are not finite."""
    if not matrix.isfinite().all():
        return matrix.new_full([min(matrix.shape)], math.nan)
    values = torch.linalg.svdvals(matrix)
    return values / values[0] if values[0] > 0 else values


def _quantiles(values: Tensor) -> Tensor:
    """POINTS values, evenly spaced from the first to the last, by linear interpolation."""
    if len(values) == 1:
        return values.expand(POINTS)
    places = torch.linspace(0, len(values) - 1, POINTS, dtype=values.dtype, device=values.device)
    left = places.long().clamp(max=len(values) - 2)
    return torch.lerp(values[left], values[left + 1], places - left)
