"""``FloraModel``: the PEFT tuner. It makes the whole plan first, and then wraps exactly the planned weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flora.layers.starts import STARTS
from flora.tuner.combine import check_combination, combined_config, fill, summed
from flora.tuner.config import FloraConfig
from flora.tuner.diffusers_compat import refuse_lora_files
from flora.tuner.layer import FloraLayer
from flora.tuner.live import one_call
from flora.tuner.mergeable_model import MergeableModel
from flora.tuner.names import call_with_names
from flora.tuner.peft_compat import (
    PREFIX,
    SAVES_BIASES,
    TARGET_MODULES,
    AuxiliaryTrainingWrapper,
    PlainNames,
    check_target_module_exists,
    init_empty_weights,
)
from flora.tuner.planning.plan import make_plan, plan
from flora.tuner.planning.saved import check_saved
from flora.tuner.planning.targets import SHORTHANDS, canonical_module, default_targets
from flora.tuner.starting import start_adapter
from flora.tuner.undo import unchanged_on_error
from flora.tuner.wrapping import with_scales_in_use, wrap_module


class FloraModel(MergeableModel):
    """A model with core spaces on its weights (paper section 4), as PEFT's ``get_peft_model`` makes it."""

    prefix = PREFIX
    tuner_layer_cls = FloraLayer
    target_module_mapping = TARGET_MODULES
    start_checked: tuple[str, ...] = ()  # the adapters of which it is known whether they were started from data

    # ------------------------------------------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. An error leaves the model as it was. A state_dict may name other layers than the config: then the
        config names these afterwards."""
        with unchanged_on_error(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._start(adapter_name)
        self.start_checked = tuple(name for name in self.start_checked if name != adapter_name)
        if not self._load_state_dict_post_hooks:
            self.register_load_state_dict_post_hook(_forget_aliases)
        config = self.peft_config[adapter_name]
        if kwargs.get("state_dict") is not None:
            wrapped = {layer.name for layer in self._layers() if adapter_name in layer.tucker_space}
            if wrapped != {row.name for row in config.plan.rows}:
                keys = list(dict.fromkeys(layer.site.module for layer in self._layers() if layer.name in wrapped))
                config.plan = replace(make_plan(self.model, config, keys=keys), scales=config.plan.scales)
                config.target_modules = "|".join(map(re.escape, keys))
                config.exclude_modules = config.layers_to_transform = config.layers_pattern = None

    def _start(self, adapter_name: str) -> None:
        start_adapter(self.model, adapter_name, self.peft_config[adapter_name])

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict) -> FloraConfig:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = default_targets(self.model, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Plan first: every error of the config against this model shows here, before any layer is touched."""
        if peft_config.bias != "none" and not SAVES_BIASES:
            raise ValueError(f"bias={peft_config.bias!r} needs PEFT 0.21 or later: this one would not save the biases")
        shorthand = peft_config.target_modules in SHORTHANDS
        # PEFT has its own error for names that match nothing, but does not know our shorthands
        made = plan(model, peft_config) if shorthand else make_plan(model, peft_config)
        if peft_config.saved_shapes is not None:
            check_saved(made, peft_config)
        made = replace(made, rows=with_scales_in_use(made.rows, model, self.peft_config, peft_config))
        refuse_lora_files(model)
        named = {row.target for row in made.rows if not row.raw}
        # PEFT knows neither our shorthands nor further names of a layer
        if shorthand or not all(check_target_module_exists(peft_config, name) for name in named):
            peft_config.target_modules = named
        peft_config.plan = made

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = canonical_module(self.model, current_key.removeprefix("_orig_mod."))
        if key in peft_config.plan.left_out:
            return
        # a layer that only a state_dict names is not in the plan
        rows = peft_config.plan.rows_of(key) or make_plan(self.model, peft_config, keys=[key]).rows
        rows = [row for row in rows if not row.raw]  # _inject_parameters wraps the raw ones
        if rows:
            wrap_module(self.model, rows, adapter_name, peft_config)

    def _inject_parameters(
        self, peft_config: FloraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        rows = [row for row in peft_config.plan.rows if row.raw]
        around = tuple(f"{row.module}." for row in rows)
        # for a second adapter PEFT does not look for layers inside those that the first has wrapped
        within = [row for row in peft_config.plan.rows if not row.raw and row.module.startswith(around)]
        for group in (within, rows):
            for module in dict.fromkeys(row.module for row in group):
                own = [row for row in group if row.module == module]
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    wrap_module(model, own, adapter_name, peft_config)
        names = [row.target for row in rows]
        # PEFT 0.20 expects this method to record the names; later versions record the returned ones
        self.targeted_parameter_names.extend(n for n in names if n not in self.targeted_parameter_names)
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # nothing to move: a CoreSpace is made on its weight's device

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return super()._get_adapter_state_dict(PlainNames(model), *args, **kwargs)

    # --------------------------------------------------------------------------------------------------- adapters

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose update is the weighted sum of others'.

        Args:
            adapters, weights: names, and one weight per name.
            adapter_name: of the new adapter.
            combination_type: "linear" and "cat" are the same exact sum here: the ranks add up, and where they would
                exceed a mode's size they are cut to it without loss (``tucker.block_sum``). "svd" rounds that sum to
                smaller ranks: the nearest tensor for a matrix, HOOI for more modes (``tucker.round_ranks``).
            svd_rank: with "svd", the rank of every mode but the kernel's. By default the ranks of the first of the
                adapters that a layer has.

        Raises:
            ValueError: for arguments that do not fit this model. Nothing is changed then.
        """
        check_combination(self.model, self.peft_config, adapters, weights, adapter_name, combination_type, svd_rank)
        sums = summed(self._layers(), adapters, weights, combination_type, svd_rank)
        self.peft_config[adapter_name] = combined_config([self.peft_config[name] for name in adapters], sums)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        fill(self.model, adapter_name, adapters, sums)

    def _warn_of_missing_start(self, adapters: Sequence[str]) -> None:
        """Unless an adapter has been loaded, or trained."""
        for name in adapters:
            config = self.peft_config[name]
            if config.saved_shapes is not None or not STARTS[config.init].from_data:
                continue
            spaces = [layer.space(name) for layer in self._layers() if name in layer.tucker_space]
            if not all(space.started for space in spaces) and not any(space.has_update for space in spaces):
                warnings.warn(
                    f"adapter {name!r} has init={config.init!r} and starts at random, because no data start was "
                    "made: call flora.initialize(model, batches), or give the Trainer callbacks=[flora.Initialize()]",
                    stacklevel=2,
                )

    def _check_stacks(self) -> None:
        """Raise ValueError if an engine has given layers factors of their own."""
        for layer in self._layers():
            stacks = (layer.space(adapter).stack for adapter in layer.tucker_space)
            if not all(stack is None or stack.is_tied for stack in stacks):
                raise ValueError(
                    f"layer {layer.name!r}: something took apart the factors that stack='layers' shares, as FSDP does; "
                    "train with DDP or ZeRO, or without stack"
                )

    # ------------------------------------------------------------------------------------------------ mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names=`` of a forward or generate call to every layer, as PEFT's LoRA does."""
        names = kwargs.pop("adapter_names", None)
        if self.training and (fresh := [name for name in self.active_adapters if name not in self.start_checked]):
            self._check_stacks()
            self.start_checked += tuple(fresh)
            self._warn_of_missing_start(fresh)
        if names is None:
            with one_call():
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {adapter for layer in self._layers() for adapter in layer.tucker_space}
        if unknown := sorted({name for name in names if name != "__base__"} - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # beam search repeats every sample, except in an encoder, which runs before the beams split
        single = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        inner = {layer.base_layer for layer in self._layers()}  # the layer around them hands the names on
        repeated = [name for name in names for _ in range(beams)]
        taking = [m for m in self.model.modules() if isinstance(m, (FloraLayer, AuxiliaryTrainingWrapper))]
        with call_with_names({m: list(names) if m in single else repeated for m in taking if m not in inner}):
            yield


def _forget_aliases(model: nn.Module, incompatible: Any) -> None:
    """A file has a layer once; PEFT would report its further names as missing."""
    first = {name for name, _ in model.named_modules()}
    names = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, FloraLayer) and n not in first]
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(f".{name}.tucker_" in f".{key}" for name in names)
    ]
