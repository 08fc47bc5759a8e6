"""Raw parameters in an nn.ParameterList or nn.ParameterDict, which a model indexes and never calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from flora.tuner.layer import FloraLayer


class FloraContainer(FloraLayer):
    """A container whose parameter ``parameter_name`` has the updates in it wherever the model takes it out."""

    def _taken_out(self, value: Any) -> Any:
        return self._seen_from_outside(self.parameter_name) if value is self.base_parameter else value

    @property
    def _inner(self) -> Any:
        return cast(Any, self.base_layer)

    def __len__(self) -> int:
        return len(self._inner)

    def __bool__(self) -> bool:
        return True  # as every module

    def __contains__(self, key: Any) -> bool:
        return key in self._inner

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[n] for n in range(*key.indices(len(self)))]
        return self._taken_out(self._inner[key])

    def __iter__(self) -> Iterator:
        if isinstance(self.get_base_layer(), nn.ParameterDict):
            return iter(self._inner)
        return (self[n] for n in range(len(self)))

    def keys(self) -> Iterator[str]:
        """A dictionary's."""
        return iter(self._inner)

    def values(self) -> Iterator[Tensor]:
        """A dictionary's."""
        return (self[key] for key in self.keys())

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """A dictionary's."""
        return ((key, self[key]) for key in self.keys())

    def get(self, key: str, default: Any = None) -> Any:
        """A dictionary's."""
        return self[key] if key in self else default


def is_container(layer: nn.Module) -> bool:
    """Whether a layer's parameters are taken out of it by index or key."""
    return isinstance(layer, (nn.ParameterList, nn.ParameterDict))
