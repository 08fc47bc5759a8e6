"""Numbers of a model's updates ΔW, whatever the method that makes them: size, amplification, spectra."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from operator import attrgetter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from flora.layers.core_space import CoreSpace
from flora.tucker import project, unfold

# Of an unfolding's singular values, those count that are above this times the largest. An update of rank r that was
# formed in float32 has rounding of about 1e-7 beyond its rank, and a Gram matrix in float64 resolves 1e-8.
TOLERANCE = 1e-5
SKETCH = 64  # columns of the random sketch; an unfolding of lower rank is found with it, exactly
POINTS = 32  # of a spectrum

Weights = Mapping[str, Tensor]


def deltas(model: nn.Module, base: Weights | None = None) -> dict[str, Tensor]:
    """Every update ΔW (I_1, …, I_N), in float64, under the name of its weight in the base model.

    Of PEFT's tuners of any kind (active adapters, with the base weight taken off for those that scale it, as DoRA);
    of LyCORIS' modules; and of weights that are trained themselves, those named in ``base``, the weights before
    training (leave out the head). Nothing for BitFit and bottleneck adapters: no weight is updated. NaN where a layer
    is no longer finite.

    Raises ValueError where an adapter is merged.
    """
    return {name: delta for name, delta, _ in updates(model, base)}


@torch.no_grad()
def updates(model: nn.Module, base: Weights | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``deltas`` one by one, each with the weight W that it changes, both float64 and (I_1, …, I_N)."""
    inside = ()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not (inside and path.startswith(inside)):
            inside = f"{path}."
            yield from _tuner_updates(path.removeprefix("base_model.model."), module)
    names = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        if hasattr(module, "get_diff_weight") and hasattr(module, "org_module"):  # LyCORIS'
            weight = module.org_weight
            path = names.get(id(module.org_module[0]), module.lora_name)
            yield f"{path}.weight", _wide(module.get_diff_weight(shape=weight.shape)[0]), _wide(weight)
    for name, parameter in model.named_parameters():
        if base and name in base and parameter.requires_grad and parameter.ndim > 1:
            before = _wide(base[name]).to(_wide(parameter).device)
            yield name, _wide(parameter) - before, before


def _tuner_updates(path: str, layer: BaseTunerLayer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """By merging a float64 copy: what a method does to its weight, be it sum, rescaling or rotation."""
    if layer.merged:
        raise ValueError(f"layer {path!r} is merged: unmerge it, its update can't be told from its weight")
    layer = copy.deepcopy(layer)
    if any(parameter.is_mps for parameter in layer.parameters()):  # it has no float64
        layer.cpu()
    layer.double()
    tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    adapted = {getattr(tuner, "parameter_name", "weight") for tuner in tuners}
    before = {name: p.detach().clone() for name, p in layer.get_base_layer().named_parameters() if p.ndim > 1}
    whole = all(p.isfinite().all() for p in layer.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an attention's own projection has been merged with it
        for tuner in tuners if whole else ():
            tuner.merge()
    for name, weight in before.items():
        merged = attrgetter(name)(layer.get_base_layer())  # PEFT's attention makes plain tensors of its parameters
        if name in adapted or not torch.equal(weight, merged):
            delta = merged.detach() - weight if whole else weight * math.nan
            yield f"{path}.{name.replace('base_layer.', '')}", delta, weight


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu" if tensor.is_mps else tensor.device, torch.float64)


@torch.no_grad()
def amplification(delta: Tensor, weight: Tensor) -> float:
    """Feature amplification factor of an update, both (I_1, …, I_N): ‖ΔW‖_F / ‖W ×₁ U₁ᵀ … ×_N U_Nᵀ‖_F.

    U_n is an orthonormal basis of the range of ΔW's mode-n unfolding, its numerical rank by ``TOLERANCE``. For a
    matrix these are the left and right singular vectors, and it is the paper's ‖ΔW‖_F / ‖Uᵀ W V‖_F (section 6.2.2,
    after Hu et al.). 0 for an update of zero, NaN for one that diverged; inf where the weight has nothing in those
    directions.
    """
    delta, weight = _wide(delta), _wide(weight)
    norm = delta.norm().item()
    if norm == 0 or not math.isfinite(norm):
        return norm
    # The range of each mode is that of the whole when the other modes have been put in theirs: the tensor shrinks.
    for mode in sorted(range(delta.ndim), key=lambda n: delta.shape[n]):
        basis = _range(unfold(delta, mode))
        if basis is not None:
            factors = [basis if n == mode else None for n in range(delta.ndim)]
            delta, weight = project(delta, factors), project(weight, factors)
    size = weight.norm().item()
    return norm / size if size else math.inf


def _range(matrix: Tensor) -> Tensor | None:
    """Orthonormal basis (I, rank) of the numerical range of (I, J); None where that is the whole space."""
    if min(matrix.shape) > 4 * SKETCH:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(matrix.shape[1], SKETCH, generator=generator, dtype=matrix.dtype)
        sketch = torch.linalg.qr(matrix @ random.to(matrix.device)).Q
        seen = sketch.mT @ matrix
        # what the sketch misses, by Pythagoras, against a lower bound of the largest singular value: if that is only
        # rounding, the rank is no higher than the sketch's
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
    """Records how updates grow (paper, Fig. 4): ``rows`` of [step, mean ‖ΔW‖_F, mean amplification] over all updates.

    About ``points`` times in a training, the first steps more often (step k² of n²), and at its end. The mean of the
    amplification leaves out what is not finite. ``base`` is for full fine-tuning, see ``deltas``. ``seconds`` is the
    time that measuring took, to be taken off the training's. Both lie in the Trainer's checkpoints, and go on from one.
    """

    def __init__(self, points: int = 20, base: Weights | None = None) -> None:
        if points < 1:
            raise ValueError(f"points={points}: expected 1 or more")
        self.points = points
        self.base = base
        self.rows: list[list[float]] = []
        self.seconds = 0.0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"rows": self.rows, "seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and (found := state.stateful_callbacks.get("Norms")):  # of a checkpoint
            self.rows, self.seconds = found["attributes"]["rows"], found["attributes"]["seconds"]
        self._steps = {1, *(-(-state.max_steps * k**2 // self.points**2) for k in range(1, self.points + 1))}

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step in self._steps:
            self._record(state, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        if not self.rows or self.rows[-1][0] != state.global_step:  # it was stopped early
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
            self.rows.append([state.global_step, _mean(sizes), _mean([f for f in factors if math.isfinite(f)])])
        self.seconds += time.perf_counter() - started


def _mean(numbers) -> float:
    return sum(numbers) / len(numbers) if len(numbers) else 0.0


@torch.no_grad()
def spectra(model: nn.Module, base: Weights | None = None) -> dict[str, list[float]]:
    """Singular values over the largest, ``POINTS`` each, as means over weights and modes; no key where there are none.

    "delta": the leading ones of each update's unfoldings along its two longest modes (of a matrix, its singular
    values), zero beyond what a weight has. "core": of a FLoRA core's unfoldings, from its first rank to its last,
    whatever the ranks are: the point i of n is the quantile i / (n - 1).
    """
    curves: dict[str, list[Tensor]] = {"delta": [], "core": []}
    for _, delta, _ in updates(model, base):
        longest = sorted(range(delta.ndim), key=lambda n: -delta.shape[n])[: 1 if delta.ndim == 2 else 2]
        for mode in longest:
            values = _singular_values(unfold(delta, mode))[:POINTS]
            curves["delta"].append(torch.cat([values, values.new_zeros(POINTS - len(values))]))
    for space in model.modules():
        if isinstance(space, CoreSpace):
            for mode, rank in enumerate(space.ranks):
                if rank > 1:
                    values = _singular_values(unfold(_wide(space.core), mode))
                    curves["core"].append(_quantiles(values))
    return {
        name: torch.stack([curve.cpu() for curve in found]).mean(0).tolist() for name, found in curves.items() if found
    }


def _singular_values(matrix: Tensor) -> Tensor:
    """The largest first, over the largest; zeros for a matrix of zeros, NaN for one that is not finite."""
    if not matrix.isfinite().all():
        return matrix.new_full([min(matrix.shape)], math.nan)
    values = torch.linalg.svdvals(matrix)
    return values / values[0] if values[0] > 0 else values


def _quantiles(values: Tensor) -> Tensor:
    """POINTS values, evenly spaced from first to last, linear between neighbours."""
    if len(values) == 1:
        return values.expand(POINTS)
    places = torch.linspace(0, len(values) - 1, POINTS, dtype=values.dtype, device=values.device)
    left = places.long().clamp(max=len(values) - 2)
    return torch.lerp(values[left], values[left + 1], places - left)
