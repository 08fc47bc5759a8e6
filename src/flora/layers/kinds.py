"""KINDS: the one list of layer types that can be adapted.

A row says which weights of a layer are adapted, what their modes mean, and how an update is applied *factored*, as thin
extra layers beside the base layer. The other way, *merged*, needs no row: the base layer itself runs with W + delta in
place of W, so stride, padding, padding mode, dilation and groups are always its own.

The factored functions take (layer, core, factors) and then what the layer's own ``forward`` takes; the core comes
scaled. They return what the update adds to the layer's output. The fused functions take (layer, weight, bias, core,
factors, input, execution), numbers all of one type, and return the output of layer and update together. Letters:
b batch, i in, o out, g groups, r ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from flora.layers.convolution import Geometry, convolution
from flora.layers.matrix import matrix

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run_with_weights(module: nn.Module, weights: dict[str, Tensor], args: tuple, kwargs: dict):
    """The module's own forward with other weights; the module is left untouched."""
    owners = {name: owner(module, name) for name in weights}
    # FSDP1 lays its view of a weight in front of the parameter, where a swap of the parameter would not be seen
    views = {name: vars(holder).pop(leaf(name)) for name, holder in owners.items() if leaf(name) in vars(holder)}
    # what made the weight needs a dense gradient, also where the table's own would be sparse
    sparse = [holder for holder in owners.values() if getattr(holder, "sparse", False)]
    for holder in sparse:
        holder.sparse = False
    try:
        return functional_call(module, weights, args, kwargs, tie_weights=False)
    finally:
        for name, view in views.items():
            vars(owners[name])[leaf(name)] = view
        for holder in sparse:
            holder.sparse = True


def _linear(layer, core, factors, input):
    output_factor, input_factor = factors
    return F.linear(F.linear(F.linear(input, input_factor.mT), core), output_factor)


def _linear_transposed(layer, core, factors, x):  # transformers' Conv1D: weight (in, out)
    input_factor, output_factor = factors
    return F.linear(F.linear(F.linear(x, input_factor.mT), core.mT), output_factor)


def _linear_fused(layer, weight, bias, core, factors, input, execution):
    return matrix(input, weight, bias, core, *factors, execution)


def _linear_transposed_fused(layer, weight, bias, core, factors, x, execution):
    input_factor, output_factor = factors
    return matrix(x, weight.mT, bias, core.mT, output_factor, input_factor, execution)


def _pointwise(input: Tensor, weight: Tensor, spatial: int, groups: int) -> Tensor:
    """1×…×1 convolution by ``weight`` (out, in/groups)."""
    return _CONV[spatial](input, weight.reshape(*weight.shape, *[1] * spatial), groups=groups)


def _kernel(core: Tensor, kernel_factors: Sequence[Tensor]) -> Tensor:
    """G ×_3 C ×_4 D (equation 6): (r, r', r_3, …) -> (r, r', k, …)."""
    basis = kernel_factors[0]
    for factor in kernel_factors[1:]:
        basis = torch.kron(basis, factor)
    sizes = [factor.shape[0] for factor in kernel_factors]
    return (core.flatten(2) @ basis.mT).unflatten(2, sizes)


def _conv(layer, core, factors, input):
    output_factor, input_factor, *kernel_factors = factors
    spatial, groups = len(kernel_factors), layer.groups
    thin = _pointwise(input, input_factor.mT.repeat(groups, 1), spatial, groups)
    kernel = _kernel(core, kernel_factors)
    thin = layer._conv_forward(thin, kernel.repeat(groups, *[1] * (spatial + 1)), None)
    return _pointwise(thin, output_factor, spatial, groups)


def _conv_fused(layer, weight, bias, core, factors, input, execution):
    padding = layer._reversed_padding_repeated_twice  # of both ends of each mode, also where it was given as a word
    if layer.padding_mode != "zeros" or padding[::2] != padding[1::2]:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        input, padding = F.pad(input, padding, mode=mode), [0] * len(padding)
    no = (0,) * len(layer.stride)
    geometry = Geometry(layer.stride, tuple(padding[::-2]), layer.dilation, False, no, layer.groups)
    return _convolve(weight, bias, core, factors, input, geometry, execution)


def _conv_transposed_fused(layer, weight, bias, core, factors, input, execution):
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, True, layer.output_padding, layer.groups)
    return _convolve(weight, bias, core, factors, input, geometry, execution)


def _convolve(weight, bias, core, factors, input, geometry, execution):
    first, second, *kernel_factors = factors
    single = input.ndim < weight.ndim  # a sample without a batch
    x = input.unsqueeze(0) if single else input
    output = convolution(x, weight, bias, _kernel(core, kernel_factors), first, second, geometry, execution)
    return output.squeeze(0) if single else output


def _conv_transposed(layer, core, factors, input, *args, **kwargs):
    input_factor, output_factor, *kernel_factors = factors
    spatial, groups = len(kernel_factors), layer.groups
    down = input_factor.reshape(groups, -1, input_factor.shape[1]).mT.flatten(0, 1)  # (g·r, i/g)
    thin = _pointwise(input, down, spatial, groups)
    kernel = _kernel(core, kernel_factors).repeat(groups, *[1] * (spatial + 1))
    weights = {"weight": kernel}
    if layer.bias is not None:
        weights["bias"] = kernel.new_zeros(groups * kernel.shape[1])
    thin = run_with_weights(layer, weights, (thin, *args), kwargs)
    return _pointwise(thin, output_factor.repeat(groups, 1), spatial, groups)


def _embedding(layer, core, factors, input):
    row_factor, output_factor = factors
    update = F.linear(F.linear(F.embedding(input, row_factor), core.mT), output_factor)
    if layer.padding_idx is not None:  # the padding row takes no part in the gradient, as in the base layer
        update = update.where((input != layer.padding_idx).unsqueeze(-1), update.detach())
    if hasattr(layer, "embed_scale"):
        update = update * layer.embed_scale
    return update


def _embedding_bag(layer, core, factors, input, offsets=None, per_sample_weights=None):
    row_factor, output_factor = factors
    bags = F.embedding_bag(
        input,
        row_factor,
        offsets,
        mode=layer.mode,
        per_sample_weights=per_sample_weights
        if per_sample_weights is None
        else per_sample_weights.to(row_factor.dtype),
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )
    return F.linear(F.linear(bags, core.mT), output_factor)


def _always(layer: nn.Module) -> bool:
    return True


def _plain_lookup(layer: nn.Module) -> bool:
    """A lookup that is linear in the table, with a gradient that no option bends."""
    return layer.max_norm is None and not layer.scale_grad_by_freq and getattr(layer, "mode", "mean") != "max"


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    ``types``: the classes, a name with its module for those outside torch. ``weights``: the names of the weights that
    are adapted, the first one first. ``roles``: of the weight's leading modes; further modes are "kernel" modes.
    ``factored``, ``fused``: the functions above; no ``factored`` where an update can only act as a weight.
    ``factorable``: whether a layer's options allow it.
    """

    name: str
    types: tuple[type | str, ...]
    roles: tuple[str, ...]
    factored: Callable[..., Tensor] | None = None
    fused: Callable[..., Tensor] | None = None
    weights: tuple[str, ...] = ("weight",)
    factorable: Callable[[nn.Module], bool] = _always

    def matches(self, layer: nn.Module) -> bool:
        return self._type(layer) is not None

    def _type(self, layer: nn.Module) -> type | None:
        for cls in type(layer).__mro__:
            if cls in self.types or f"{cls.__module__}.{cls.__qualname__}" in self.types:
                return cls
        return None

    def can_factor(self, layer: nn.Module) -> bool:
        """Whether beside-the-layer is the same as inside-the-weight: not so for a subclass with a forward of its own
        (weight standardisation, say), unless it is an embedding that only multiplies its output."""
        if self.factored is None or not self.factorable(layer):
            return False
        stock = self._type(layer)
        own = type(layer).forward is stock.forward and getattr(type(layer), "_conv_forward", None) is getattr(
            stock, "_conv_forward", None
        )
        return own or (self.name == "Embedding" and hasattr(layer, "embed_scale"))

    def roles_of(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return self.roles + ("kernel",) * (len(shape) - len(self.roles))


KINDS = (
    Kind("Linear", (nn.Linear,), ("out", "in"), _linear, _linear_fused),
    Kind("Conv1D", ("transformers.pytorch_utils.Conv1D",), ("in", "out"), _linear_transposed, _linear_transposed_fused),
    Kind("Conv", (nn.Conv1d, nn.Conv2d, nn.Conv3d), ("out", "in"), _conv, _conv_fused),
    Kind(
        "ConvTranspose",
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        ("in", "out"),
        _conv_transposed,
        _conv_transposed_fused,
    ),
    Kind("Embedding", (nn.Embedding,), ("in", "out"), _embedding, factorable=_plain_lookup),
    Kind("EmbeddingBag", (nn.EmbeddingBag,), ("in", "out"), _embedding_bag, factorable=_plain_lookup),
    Kind("Bilinear", (nn.Bilinear,), ("out", "in", "in")),
    Kind(
        "MultiheadAttention",
        (nn.MultiheadAttention,),
        ("out", "in"),
        weights=("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
)

MAX_MODES = 6


def possible(execution: str, kind: Kind | None, layer: nn.Module, shape: Sequence[int]) -> str:
    """The execution asked for; "merged" where an update can only act as a weight: attention's packed projections,
    layers with a forward of their own, raw parameters that are no stack of matrices."""
    stack = kind is None and len(shape) > 2
    return execution if stack or (kind is not None and kind.can_factor(layer)) else "merged"


def is_plain(weight: Tensor) -> bool:
    """A frozen tensor like any other: not one of a type of its own (sharded, quantized), nor one that trains."""
    return type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad


def is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer does no more than its class's forward: no hooks (sharding, offloading, a user's own),
    no forward of its own."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and "forward" not in vars(layer)


def kind_of(layer: nn.Module) -> Kind | None:
    """The row that a layer belongs to, or None."""
    return next((kind for kind in KINDS if kind.matches(layer)), None)


def weight_names(layer: nn.Module) -> list[str]:
    """Names of the weights of ``layer`` that its kind adapts and that this very layer has; the kind's first where it
    has none as a parameter, for ``describe`` to refuse."""
    kind = kind_of(layer)
    if kind is None:
        return []
    present = [name for name in kind.weights if owner(layer, name)._parameters.get(leaf(name)) is not None]
    return present or [kind.weights[0]]


def owner(layer: nn.Module, weight: str) -> nn.Module:
    """The module that holds the weight of that dotted name."""
    return layer.get_submodule(weight.rpartition(".")[0])


def leaf(weight: str) -> str:
    return weight.rpartition(".")[2]


def full_name(module: str, weight: str) -> str:
    """The layer's name, followed by the weight's where that is not plainly "weight"."""
    return module if weight == "weight" else f"{module}.{weight}"


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The full shape, also where ZeRO-3 has taken the weight apart."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def describe(layer: nn.Module, weight: str) -> tuple[Kind | None, tuple[int, ...], tuple[str, ...]]:
    """Kind (None for a raw parameter), shape and roles of one weight of a layer.

    Raises ValueError, without the layer's name, where the weight can't be adapted.
    """
    parameter = owner(layer, weight)._parameters.get(leaf(weight))
    if parameter is None:
        raise ValueError(f"{weight!r} is not a parameter of {type(layer).__name__} (computed by a parametrization?)")
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{weight!r} has no shape yet; run the lazy {type(layer).__name__} once first")
    shape = shape_of(parameter)
    if not parameter.dtype.is_floating_point:
        raise ValueError(f"{weight!r} has dtype {parameter.dtype}; a floating-point weight is needed")
    if not 1 <= len(shape) <= MAX_MODES or 0 in shape:
        raise ValueError(
            f"{weight!r} has shape {list(shape)}; 1 to {MAX_MODES} modes are supported, none of them empty"
        )
    kind = kind_of(layer)
    if kind is not None and weight in kind.weights:
        return kind, shape, kind.roles_of(shape)
    return None, shape, ("other",) * len(shape)


@dataclass(frozen=True)
class Site:
    """Where an update acts: all that a converter must know of a layer, and that the weight's shape does not tell.

    ``kind``: the row's name, "parameter" for a raw one. ``path``: the module's in the adapted model, where wrappers
    make it another than its name. ``beside``: an update of the weight is one of the output, too. ``is_transposed``: of
    stacked matrices, (…, in, out) and not (…, out, in), as transformers and PEFT call it.
    """

    kind: str
    module: str
    parameter: str = "weight"
    path: str = ""
    groups: int = 1
    dilated: bool = False
    padding_mode: str = "zeros"
    beside: bool = True
    is_transposed: bool = False

    @classmethod
    def of(cls, layer: nn.Module, kind: Kind | None, module: str, parameter: str, path: str = "") -> Site:
        return cls(
            kind="parameter" if kind is None else kind.name,
            module=module,
            parameter=parameter,
            path=path if path != module else "",
            groups=getattr(layer, "groups", 1),
            dilated=any(step != 1 for step in getattr(layer, "dilation", ())),
            padding_mode=getattr(layer, "padding_mode", "zeros"),
            beside=kind is not None and kind.can_factor(layer),
            is_transposed=bool(getattr(layer, "is_transposed", False)),
        )

    @property
    def name(self) -> str:
        return full_name(self.module, self.parameter)

    @property
    def stem(self) -> str:
        """What the names of its tensors in an adapter's file begin with, after "base_model.model."."""
        return self.path or self.module

    @property
    def depth(self) -> int:
        """How many wrapped weights of the same module come before it."""
        return (len(self.stem) - len(re.sub(r"(\.base_layer)+$", "", self.stem))) // len(".base_layer")

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the leading modes; further ones are kernel modes. Empty for a raw parameter."""
        return next((kind.roles for kind in KINDS if kind.name == self.kind), ())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, under its name: what is not as usual."""
        pairs = ((field, getattr(self, field.name)) for field in fields(self))
        facts = {field.name: value for field, value in pairs if value != field.default}
        return facts if self.module != self.name else {key: v for key, v in facts.items() if key != "module"}


def output_mode(roles: tuple[str, ...]) -> int:
    """The mode whose factor is zero at LoRA's start: the output's; the last mode of a raw parameter."""
    return roles.index("out") if "out" in roles else len(roles) - 1


def input_mode(roles: tuple[str, ...]) -> int:
    """The mode that rank dropout thins: the input's; the first mode of a raw parameter."""
    return roles.index("in") if "in" in roles else 0


def fan_in(shape: tuple[int, ...], roles: tuple[str, ...]) -> int:
    """How many weights meet in one output: the size of all modes but the output's."""
    size = 1
    for n, length in enumerate(shape):
        size *= 1 if n == output_mode(roles) else length
    return size


def features(layer: nn.Module, shape: tuple[int, ...], roles: tuple[str, ...]) -> tuple[int, int]:
    """Width of the layer's input and of its output; a grouped convolution's second mode is of one group only."""
    widths = [size * getattr(layer, "groups", 1) if n == 1 else size for n, size in enumerate(shape)]
    return widths[input_mode(roles)], widths[output_mode(roles)]


def supported() -> str:
    """The list for error messages."""
    names = [t if isinstance(t, str) else f"torch.nn.{t.__name__}" for kind in KINDS for t in kind.types]
    return ", ".join(names) + "; any other parameter through target_parameters"
