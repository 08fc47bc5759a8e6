"""KINDS: the one list of layer types that can be adapted.

A row says which weights of a layer are adapted, what their modes mean, how an update runs *factored*, beside the layer,
and which forms it has in other programs' files. The *merged* execution needs no row: the layer itself runs with
W + delta in the place of W, so stride, padding, dilation and groups are always its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flora.layers import batches
from flora.layers.core_space import CoreSpace
from flora.layers.execution import beside
from flora.layers.weights import storage
from flora.layers.weights.parameters import parameter_of, shape_of
from flora.layers.weights.sharded import is_distributed
from flora.layers.weights.storage import logical_shape, storage_of

MAX_MODES = 6


def _always(layer: nn.Module) -> bool:
    return True


def _never(layer: nn.Module) -> bool:
    return False


def _nothing(layer: nn.Module, space: CoreSpace) -> None:
    pass


def _plain_lookup(layer: Any) -> bool:
    """A lookup that is linear in the table, and whose gradient no option changes."""
    return layer.max_norm is None and not layer.scale_grad_by_freq and getattr(layer, "mode", "mean") != "max"


def _clear_padding_row(layer: Any, space: CoreSpace) -> None:
    """The padding row never learns, so its update must start at zero."""
    if layer.padding_idx is not None and not space.core.is_meta:
        space.factors[0].data[layer.padding_idx] = 0


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of layer.

    Args:
        name: its name in files and messages.
        types: the classes; a dotted name for those outside torch.
        quantized: dotted names of classes that compute the same with a weight that they quantize.
        roles: of the weight's leading modes, "out" or "in". ``rest`` is the role of further modes.
        factored, fused, plain: how a layer and its update run (see ``beside``). None for ``factored``: the update can
            only act as a weight.
        weights: parameter names to adapt, primary weight first.
        factorable: whether a layer's options allow the factored execution.
        scales_output: whether a layer with a forward of its own only multiplies its class's output.
        after_start: what a fresh core space of this layer needs beyond its start.
        is_matrix: whether it is a linear layer, for "all-linear" and PEFT's own converter.
        input_name: the name of the forward's first argument.
        samples: the number of samples in a forward's arguments; None for a single one without a mode of its own.
        private: underscored attributes that models read from such a layer.
        lora_form: its layout in PEFT's LoRA, "linear", "conv", "embedding" or "parameter"; None if it has none.
        locon_form: its layout in LyCORIS' LoCon, "linear" or "conv"; None if it has none.
    """

    name: str
    types: tuple[type | str, ...]
    roles: tuple[str, ...]
    factored: Callable[..., Tensor] | None = None
    fused: Callable[..., Tensor] | None = None
    plain: Callable[..., Tensor] | None = None
    weights: tuple[str, ...] = ("weight",)
    rest: str = "kernel"
    factorable: Callable[[nn.Module], bool] = _always
    scales_output: Callable[[nn.Module], bool] = _never
    after_start: Callable[[nn.Module, CoreSpace], None] = _nothing
    is_matrix: bool = False
    input_name: str = "input"
    samples: Callable[..., int | None] = batches.rows
    private: tuple[str, ...] = ()
    lora_form: str | None = None
    locon_form: str | None = None
    quantized: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return kind_named, (self.name,)  # copies and pickles are the row itself

    def type_of(self, layer: nn.Module) -> type | None:
        """The class of this row that the layer is an instance of, or None."""
        for cls in type(layer).__mro__:
            if cls in self.types or f"{cls.__module__}.{cls.__qualname__}" in (*self.types, *self.quantized):
                return cls
        return None

    def quantizes(self, layer: nn.Module) -> bool:
        """Whether the layer's class quantizes its weight."""
        cls = self.type_of(layer)
        return cls is not None and f"{cls.__module__}.{cls.__qualname__}" in self.quantized

    def can_factor(self, layer: nn.Module) -> bool:
        """Whether an update beside the layer equals one inside the weight. A subclass with a forward of its own (weight
        standardisation, say) cannot, unless it only scales the output."""
        if self.factored is None or not self.factorable(layer):
            return False
        stock: Any = self.type_of(layer)
        if stock.forward is nn.Module.forward:  # gptqmodel's base class leaves it to each kernel
            return True
        own_forward = type(layer).forward is not stock.forward or (
            getattr(type(layer), "_conv_forward", None) is not getattr(stock, "_conv_forward", None)
        )
        return not own_forward or self.scales_output(layer)

    def roles_of(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """One role per mode of a weight of this shape."""
        return self.roles + (self.rest,) * (len(shape) - len(self.roles))

    @property
    def input_first(self) -> bool:
        """Whether the input mode is the weight's first."""
        return self.roles[:1] == ("in",)


RAW = Kind("parameter", (), (), rest="other", lora_form="parameter")
LINEAR = Kind(
    "Linear",
    (nn.Linear,),
    ("out", "in"),
    beside.linear,
    beside.linear_fused,
    beside.linear_plain,
    is_matrix=True,
    lora_form="linear",
    locon_form="linear",
    quantized=storage.LINEAR,
)
LINEAR_TRANSPOSED = Kind(
    "Conv1D",
    ("transformers.pytorch_utils.Conv1D",),
    ("in", "out"),
    beside.linear_transposed,
    beside.linear_transposed_fused,
    beside.linear_transposed_plain,
    is_matrix=True,
    input_name="x",
    lora_form="linear",
)
CONV = Kind(
    "Conv",
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    ("out", "in"),
    beside.conv,
    beside.conv_fused,
    beside.conv_plain,
    lora_form="conv",
    locon_form="conv",
    quantized=storage.CONV,
    samples=batches.images,
)
CONV_TRANSPOSED = Kind(
    "ConvTranspose",
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ("in", "out"),
    beside.conv_transposed,
    beside.conv_transposed_fused,
    beside.conv_transposed_plain,
    samples=batches.images,
)
EMBEDDING = Kind(
    "Embedding",
    (nn.Embedding,),
    ("in", "out"),
    beside.embedding,
    plain=beside.embedding_plain,
    factorable=_plain_lookup,
    scales_output=lambda layer: hasattr(layer, "embed_scale"),
    after_start=_clear_padding_row,
    lora_form="embedding",
    quantized=storage.EMBEDDING,
)
EMBEDDING_BAG = Kind(
    "EmbeddingBag",
    (nn.EmbeddingBag,),
    ("in", "out"),
    beside.embedding_bag,
    factorable=_plain_lookup,
    after_start=_clear_padding_row,
    samples=batches.bags,
)
BILINEAR = Kind("Bilinear", (nn.Bilinear,), ("out", "in", "in"), input_name="input1")
ATTENTION = Kind(
    "MultiheadAttention",
    (nn.MultiheadAttention,),
    ("out", "in"),
    weights=("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    input_name="query",
    private=("_qkv_same_embed_dim",),
    samples=batches.sequences,
)

KINDS = (LINEAR, LINEAR_TRANSPOSED, CONV, CONV_TRANSPOSED, EMBEDDING, EMBEDDING_BAG, BILINEAR, ATTENTION)


def kind_of(layer: nn.Module) -> Kind | None:
    """The row that a layer belongs to, or None."""
    return next((kind for kind in KINDS if kind.type_of(layer) is not None), None)


def kind_named(name: str) -> Kind:
    """The row with this name. Raises ValueError if there is none."""
    found = {kind.name: kind for kind in (*KINDS, RAW)}.get(name)
    if found is None:
        raise ValueError(f"unknown kind of layer {name!r}")
    return found


def weight_names(layer: nn.Module) -> list[str]:
    """Names of the weights that the layer's kind adapts and that this layer has. If it has none as a parameter, the
    primary one, for ``describe`` to refuse."""
    kind = kind_of(layer)
    if kind is None:
        return []
    return [name for name in kind.weights if parameter_of(layer, name) is not None] or [kind.weights[0]]


def describe(layer: nn.Module, weight: str) -> tuple[Kind, tuple[int, ...]]:
    """Kind (``RAW`` for a raw parameter) and shape of one weight of a layer.

    Raises ValueError, without the layer's name, if the weight cannot be adapted.
    """
    kind = kind_of(layer)
    kind = kind if kind is not None and weight in kind.weights else RAW
    storage, parameter = storage_of(layer, weight), parameter_of(layer, weight)
    if storage is not None:
        if not kind.can_factor(layer):
            raise ValueError(f"{weight!r} is kept as {storage.name}, and no update can run beside a layer of this type")
        return kind, logical_shape(layer, weight)
    if parameter is None:
        raise ValueError(f"{weight!r} is not a parameter of {type(layer).__name__} (computed by a parametrization?)")
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{weight!r} has no shape yet; run the lazy {type(layer).__name__} once first")
    if getattr(layer, "_hf_tp_plan", None) and not is_distributed(parameter):
        raise ValueError(
            f"{weight!r} of shape {list(parameter.shape)} is one process's part, as tensor parallelism of transformers "
            "before 5.17 keeps it; a later transformers is needed"
        )
    shape = shape_of(parameter)
    if not parameter.dtype.is_floating_point:
        raise ValueError(f"{weight!r} has dtype {parameter.dtype}; a floating-point weight is needed")
    if not 1 <= len(shape) <= MAX_MODES or 0 in shape:
        raise ValueError(f"{weight!r} has shape {list(shape)}; 1 to {MAX_MODES} modes are supported, and no empty one")
    return kind, shape


def possible(execution: str, kind: Kind, layer: nn.Module, weight: str, shape: tuple[int, ...]) -> str:
    """The requested execution, or the only one: "factored" beside a quantized weight; "merged" if an update can only
    act as a weight (attention's packed projections, layers with a forward of their own, raw parameters that are no
    stack of matrices)."""
    if only_beside(kind, layer, weight):
        return "factored"
    is_stack = kind is RAW and len(shape) > 2
    return execution if is_stack or kind.can_factor(layer) else "merged"


def only_beside(kind: Kind, layer: nn.Module, weight: str) -> bool:
    """Whether an update must run beside the layer, since the layer does not compute with a plain weight."""
    return kind.quantizes(layer) or storage_of(layer, weight) is not None


def output_mode(roles: tuple[str, ...]) -> int:
    """The mode whose factor is zero at LoRA's start: the output's; the last mode of a raw parameter."""
    return roles.index("out") if "out" in roles else len(roles) - 1


def input_mode(roles: tuple[str, ...]) -> int:
    """The mode that rank dropout thins: the input's; the first mode of a raw parameter."""
    return roles.index("in") if "in" in roles else 0


def features(layer: nn.Module, shape: tuple[int, ...], roles: tuple[str, ...]) -> tuple[int, int]:
    """Widths of the layer's input and output. The second mode of a grouped convolution counts one group only."""
    widths = [size * getattr(layer, "groups", 1) if n == 1 else size for n, size in enumerate(shape)]
    return widths[input_mode(roles)], widths[output_mode(roles)]


def supported() -> str:
    """The supported layer types, for error messages."""
    names = [t if isinstance(t, str) else f"torch.nn.{t.__name__}" for kind in KINDS for t in kind.types]
    return ", ".join(names) + ", also quantized; any other parameter through target_parameters"
