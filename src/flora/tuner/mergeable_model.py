"""A model that is merged and unmerged whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from flora.tuner.layer import FloraLayer
from flora.tuner.live import detach
from flora.tuner.merging import surely_mergeable
from flora.tuner.peft_compat import BaseTuner
from flora.tuner.quantized import warn_of_loss


class MergeableModel(BaseTuner):
    """A PEFT tuner that looks at all its layers before it changes the weight of one."""

    def _layers(self) -> Iterator[FloraLayer]:
        return (module for module in self.model.modules() if isinstance(module, FloraLayer))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but the weights from before are kept for ``unmerge_adapter``: as many bytes again. Raises
        ValueError before any layer is merged if one cannot be."""
        self._check_merge_allowed()
        self.check_unchanged()
        self._check_finite(adapter_names, safe_merge)
        for layer in self._layers():  # not in PEFT's way, whose loading of offloaded weights drops some again
            layer.merge_checked(adapter_names, keep=True)
        warn_of_loss(list(self._layers()))

    def unmerge_adapter(self) -> None:
        """As PEFT's. The weights are as before to the bit. Raises ValueError, and changes nothing, if one of them has
        changed while it was merged."""
        self.check_unchanged()
        for layer in self._layers():
            layer.put_back()

    def check_unchanged(self) -> None:
        """Raise ValueError if the weight of a layer has changed while adapters were merged into it."""
        for layer in self._layers():
            layer.check_unchanged()

    def disable_adapter_layers(self) -> None:
        """As PEFT's, which unmerges."""
        self.check_unchanged()
        super().disable_adapter_layers()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which unmerges."""
        self.check_unchanged()
        super().set_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = list(self._layers())
        if merge:
            self._check_merge_allowed()
            self._check_finite(adapter_names, safe_merge)
        # PEFT neither looks inside wrapped layers, nor finds a layer whose path has changed meanwhile or that has two
        bases: dict[nn.Module | None, nn.Module] = {}
        for name, layer in reversed(list(self.model.named_modules())):
            if isinstance(layer, FloraLayer) and name.rpartition(".")[2] != "base_layer":
                bases[layer] = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for parent in list(self.model.modules()):
            parent._modules |= {leaf: bases[child] for leaf, child in parent._modules.items() if child in bases}
        detach(self.model)
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        warn_of_loss(layers)
        return model

    def _check_finite(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Look at every layer before the first one is merged: a model is merged whole or not at all."""
        layers = list(self._layers())
        if not surely_mergeable(layers, adapter_names, safe_merge):
            for layer in layers:
                layer.check_mergeable(adapter_names, safe_merge)
