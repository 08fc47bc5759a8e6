"""One row a layer situation. Every contract of tests/test_contract.py runs over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Case:
    """``make`` builds the layer; ``inputs`` its arguments; ``parameters`` names raw parameters to target instead of the
    layer; ``batch_mode``: the input's mode that counts samples."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    parameters: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    batch_mode: int | None = 0  # None: no batch of samples to mix adapters in


class Experts(nn.Module):
    """Stacked experts: (E, in, out) and (E, out, in), each sample through all of them."""

    def __init__(self, experts: int = 3, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


class LoopedExperts(Experts):
    """As language models run them: one expert's matrix at a time, taken out of the stack in one way or another."""

    def forward(self, x: Tensor) -> Tensor:
        number = torch.tensor(1)
        first = torch.tanh(x @ self.up[0]) @ self.down[number] + x @ self.up[-1] @ self.down.mT[2].T
        pairs = zip(self.up, self.down.unbind(), strict=True)
        each = [torch.tanh(F.linear(x, up.mT)) @ down.T.transpose(0, 1) for up, down in pairs]
        return torch.stack([first, *each]).sum(0) + self.down[0, 0]


class Raw(nn.Module):
    """A bare parameter of any order, used entry by entry."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.sum(-1, keepdim=True) * self.table.flatten()).cumsum(-1)


class Listed(nn.Module):
    """Parameters in a list, taken out one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.ps = nn.ParameterList([torch.randn(6, 6) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for p in self.ps:
            x = torch.tanh(x @ p)
        return x @ self.ps[-1] + x @ self.ps[0] @ self.ps[1] * len(self.ps) if self.ps else x


class Keyed(nn.Module):
    """Parameters in a dictionary, taken out in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.pd = nn.ParameterDict({"a": torch.randn(6, 6), "b": torch.randn(6, 4)})

    def forward(self, x: Tensor) -> Tensor:
        total = sum(p.sum() for p in self.pd.values()) + sum(len(key) * p.mean() for key, p in self.pd.items())
        keys = [key for key in self.pd if key in self.pd.keys()]
        return torch.tanh(x @ self.pd["a"]) @ self.pd[keys[1]] + x @ self.pd.b + total + self.pd.get("c", 1.0)


class StandardizedConv2d(nn.Conv2d):
    """A subclass with a forward of its own: not linear in the weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(input, weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    """As in Gemma: the output is multiplied by ``embed_scale``."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def floats(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.randn(shape),)


def tokens(rows: int, *shape: int) -> Callable[[], tuple]:
    return lambda: (torch.arange(int(torch.tensor(shape).prod())).reshape(shape) % rows,)


IMAGE = {1: (2, 4, 9), 2: (2, 4, 9, 8), 3: (2, 4, 5, 6, 5)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(name: str, dims: int, out: int = 6, kernel=3, table=CONV, **options) -> Case:
    cls = table[dims]
    return Case(f"{cls.__name__}-{name}", lambda: cls(4, out, kernel, **options), floats(*IMAGE[dims]))


def transposed(name: str, dims: int, out: int = 6, kernel=3, **options) -> Case:
    return conv(name, dims, out, kernel, table=TRANSPOSED, **options)


def attention(name: str, batch_first: bool = True, cross: bool = False, **options) -> Case:
    shape = (2, 5, 8) if batch_first else (5, 2, 8)
    sizes = (options.get("kdim", 8), options.get("vdim", 8))

    def inputs() -> tuple:
        x = torch.randn(shape)
        key, value = (torch.randn(*shape[:2], size) for size in sizes) if cross else (x, x)
        return x, key, value

    make = lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)  # noqa: E731
    return Case(f"MultiheadAttention-{name}", make, inputs, batch_mode=0 if batch_first else 1)


def bag(name: str, mode: str, inputs=None, **options) -> Case:
    batch_mode = 0 if inputs is None else None
    return Case(
        f"EmbeddingBag-{name}", lambda: nn.EmbeddingBag(11, 5, mode=mode, **options), inputs or tokens(11, 3, 4),
        batch_mode=batch_mode,
    )  # fmt: skip


def container(name: str, make: Callable[[], nn.Module], *parameters: str) -> Case:
    return Case(name, make, floats(4, 6), parameters=parameters, config={"r": 2}, batch_mode=None)


def raw(*shape: int) -> Case:
    name = "x".join(map(str, shape))
    return Case(f"parameter-{name}", lambda: Raw(*shape), floats(2, 3), parameters=("layer.table",))


CASES = [
    Case("Linear-bias", lambda: nn.Linear(7, 5), floats(3, 7)),
    Case("Linear-no_bias", lambda: nn.Linear(7, 5, bias=False), floats(2, 4, 7)),
    Case("Linear-one_in", lambda: nn.Linear(1, 5), floats(3, 1)),
    Case("Linear-one_out", lambda: nn.Linear(7, 1), floats(3, 7)),
    Case("Linear-ranks_differ", lambda: nn.Linear(7, 5), floats(3, 7), config={"r": [2, 4]}),
    Case("Linear-rank_over_size", lambda: nn.Linear(7, 5), floats(3, 7), config={"r": 64}),
    Case("Conv1D", lambda: Conv1D(5, 7), floats(2, 3, 7)),
    *(conv("plain", dims) for dims in (1, 2, 3)),
    *(conv("stride", dims, stride=2, padding=1) for dims in (1, 2, 3)),
    *(conv("dilation", dims, dilation=2, padding=2) for dims in (1, 2, 3)),
    *(conv("groups", dims, groups=2, padding=1) for dims in (1, 2, 3)),
    *(conv("depthwise", dims, out=4, groups=4, padding=1) for dims in (1, 2, 3)),
    *(conv("circular", dims, padding=1, padding_mode="circular") for dims in (1, 2, 3)),
    conv("depthwise_multiplier", 2, out=8, groups=4, padding=1),
    conv("reflect", 2, padding=2, padding_mode="reflect"),
    conv("replicate_groups", 2, padding=1, padding_mode="replicate", groups=2),
    conv("same", 2, padding="same", dilation=2),
    conv("same_even_kernel", 1, kernel=4, padding="same", padding_mode="circular"),
    conv("valid_no_bias", 2, padding="valid", bias=False),
    conv("tuple_padding", 2, padding=(2, 0), stride=(1, 2)),
    conv("pointwise", 2, kernel=1),
    conv("pointwise_groups", 2, kernel=1, groups=2),
    conv("tall_kernel", 2, kernel=(3, 1), padding=(1, 0)),
    conv("wide_kernel", 2, out=4, kernel=7, groups=4, padding=3),
    Case("Conv2d-kernel_rank", lambda: nn.Conv2d(4, 6, 3), floats(*IMAGE[2]), config={"kernel_rank": 1}),
    Case("Conv2d-ranks", lambda: nn.Conv2d(4, 6, 3), floats(*IMAGE[2]), config={"r": [3, 2, 3, 1]}),
    Case("Conv2d-unbatched", lambda: nn.Conv2d(4, 6, 3), floats(4, 9, 8), batch_mode=None),
    Case("Conv2d-own_forward", lambda: StandardizedConv2d(4, 6, 3), floats(*IMAGE[2])),
    *(transposed("plain", dims) for dims in (1, 2, 3)),
    *(transposed("stride", dims, stride=2, padding=1, output_padding=1) for dims in (1, 2, 3)),
    *(transposed("groups", dims, groups=2) for dims in (1, 2, 3)),
    transposed("dilation_no_bias", 2, dilation=2, bias=False),
    transposed("depthwise", 2, out=4, groups=4, stride=2),
    Case("Embedding", lambda: nn.Embedding(11, 5), tokens(11, 3, 6)),
    Case("Embedding-padding", lambda: nn.Embedding(11, 5, padding_idx=0), tokens(11, 3, 6)),
    Case("Embedding-max_norm", lambda: nn.Embedding(11, 5, max_norm=1.0), tokens(11, 3, 6)),
    Case("Embedding-by_freq", lambda: nn.Embedding(11, 5, scale_grad_by_freq=True), tokens(4, 3, 6)),
    Case("Embedding-sparse", lambda: nn.Embedding(11, 5, sparse=True), tokens(11, 3, 6)),
    Case("Embedding-scaled", lambda: ScaledEmbedding(11, 5, padding_idx=2), tokens(11, 3, 6)),
    bag("mean", "mean"),
    bag("sum_padding", "sum", padding_idx=1),
    bag("max", "max"),
    bag("sparse", "sum", sparse=True),
    bag("offsets", "sum", lambda: (torch.arange(9) % 11, torch.tensor([0, 2, 5]))),
    bag("last_offset", "mean", lambda: (torch.arange(9) % 11, torch.tensor([0, 2, 5, 9])), include_last_offset=True),
    bag("sample_weights", "sum", lambda: (torch.arange(8).reshape(2, 4), None, torch.rand(2, 4))),
    Case("Bilinear", lambda: nn.Bilinear(4, 3, 5), lambda: (torch.randn(2, 4), torch.randn(2, 3))),
    attention("packed"),
    attention("batch_second", batch_first=False),
    attention("no_bias", bias=False),
    attention("bias_kv", add_bias_kv=True, add_zero_attn=True),
    attention("separate", cross=True, kdim=6, vdim=4),
    raw(9),
    raw(4, 5),
    raw(3, 4, 5),
    raw(3, 2, 2, 4),
    raw(2, 3, 2, 2, 3),
    raw(2, 2, 3, 2, 2, 2),
    Case("experts-one_stack", Experts, floats(4, 6), parameters=("layer.up",)),
    Case("experts-one_by_one", LoopedExperts, floats(4, 6), parameters=("layer.up", "layer.down"), config={"r": 2}),
    Case("experts-both_stacks", Experts, floats(4, 6), parameters=("layer.up", "layer.down"), config={"r": 2}),
    container("ParameterList", Listed, "ps.0", "ps.1", "ps.2"),
    container("ParameterDict", Keyed, "pd.a", "pd.b"),
    container("ParameterDict-one", Keyed, "pd.b"),
    Case("LayerNorm-weight", lambda: nn.LayerNorm(6), floats(4, 6), parameters=("layer.weight",)),
    Case("Conv2d-as_parameter", lambda: nn.Conv2d(4, 6, 3), floats(*IMAGE[2]), parameters=("layer.weight",)),
]
