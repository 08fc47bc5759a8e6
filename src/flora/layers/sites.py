"""Where an update acts, in words that a file can hold."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import nn

from flora.layers.kinds import LINEAR, Kind, kind_named
from flora.layers.weights.parameters import full_name


@dataclass(frozen=True)
class Site:
    """One adapted weight, with all that a converter must know of its layer.

    Args:
        kind: the row of the layer, ``RAW`` for a raw parameter.
        module, parameter: the layer's name in the base model, and the weight's name in the layer.
        path: the layer's name in the adapted model if wrappers change it, else "".
        groups, dilated, padding_mode: a convolution's options.
        beside: whether the update of the weight can also run beside the layer.
        is_transposed: stacked matrices are (…, in, out) and not (…, out, in), as transformers and PEFT call it.
        contained: whether a raw parameter lies in an nn.ParameterList or nn.ParameterDict.
    """

    kind: Kind
    module: str
    parameter: str = "weight"
    path: str = ""
    groups: int = 1
    dilated: bool = False
    padding_mode: str = "zeros"
    beside: bool = True
    is_transposed: bool = False
    contained: bool = False

    @classmethod
    def of(cls, layer: nn.Module, kind: Kind, module: str, parameter: str, path: str = "") -> Site:
        """The site of a layer's weight."""
        return cls(
            kind=kind,
            module=module,
            parameter=parameter,
            path=path if path != module else "",
            groups=getattr(layer, "groups", 1),
            dilated=any(step != 1 for step in getattr(layer, "dilation", ())),
            padding_mode=getattr(layer, "padding_mode", "zeros"),
            beside=kind.can_factor(layer),
            is_transposed=bool(getattr(layer, "is_transposed", False)),
            contained=isinstance(layer, (nn.ParameterList, nn.ParameterDict)),
        )

    @classmethod
    def from_dict(cls, name: str, facts: dict[str, Any]) -> Site:
        """The inverse of ``to_dict``. Raises ValueError for facts that ``to_dict`` does not write."""
        if not isinstance(facts, dict):
            raise ValueError(f"{name!r} has {facts!r}; a dictionary is needed")
        types = {field.name: str if field.default is MISSING else type(field.default) for field in fields(cls)}
        for key, value in facts.items():
            if type(value) is not types.get(key):
                raise ValueError(f"{name!r} has {key}={value!r}")
        return cls(**{"module": name, **facts, "kind": kind_named(facts.get("kind", LINEAR.name))})

    def to_dict(self) -> dict[str, Any]:
        """For JSON, under ``name``: the kind's name, and every other fact that differs from its default."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        facts = {field.name: facts[field.name] for field in fields(self) if facts[field.name] != field.default}
        if self.module == self.name:
            del facts["module"]
        return facts | {"kind": self.kind.name}

    @property
    def name(self) -> str:
        """The layer's name, followed by the weight's unless that is plainly "weight"."""
        return full_name(self.module, self.parameter)

    @property
    def stem(self) -> str:
        """The start of its tensors' names in an adapter's file, after "base_model.model."."""
        return self.path or self.module

    @property
    def depth(self) -> int:
        """The number of wrapped weights of the same module that come before it."""
        return (len(self.stem) - len(re.sub(r"(\.base_layer)+$", "", self.stem))) // len(".base_layer")

    def modes(self, shape: tuple[int, ...]) -> str:
        """Kind of layer and order of the modes, "Conv1D (in × out)": where sizes are equal, no shape tells them."""
        transposed = ", transposed" if self.is_transposed and len(shape) > 2 else ""
        return f"{self.kind.name} ({' × '.join(self.kind.roles_of(shape))}{transposed})"
