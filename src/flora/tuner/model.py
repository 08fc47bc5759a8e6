"""``FloraModel``: the PEFT tuner. It wraps what the plan says, and nothing before the plan has been made in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from flora import tucker
from flora.tuner.config import FloraConfig, check_rank
from flora.tuner.layer import FloraLayer
from flora.tuner.peft_compat import PREFIX, SAVES_BIASES
from flora.tuner.planning import Row, check_saved, make_plan, plan
from flora.tuner.targets import SHORTHANDS, canonical_module, unwrapped


class FloraModel(BaseTuner):
    """A model with core spaces on its weights (paper section 4), as PEFT's ``get_peft_model`` makes it."""

    prefix = PREFIX
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ------------------------------------------------------------------------------------------------- injection

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict) -> FloraConfig:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config = super()._prepare_adapter_config(peft_config, model_config)
        return peft_config

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Plan first: every error of the config against this model shows here, before any layer is touched."""
        name = _name_of(peft_config, self.peft_config)
        if peft_config.bias != "none" and not SAVES_BIASES:
            raise ValueError(f"bias={peft_config.bias!r} needs PEFT 0.21 or later: this one would not save the biases")
        shorthand = peft_config.target_modules in SHORTHANDS
        # for names that match nothing PEFT has its own words; it does not know what a shorthand leaves out
        made = plan(model, peft_config) if shorthand else make_plan(model, peft_config)
        if peft_config.saved_shapes is not None:
            check_saved(made, peft_config.saved_shapes)
        if shorthand:
            peft_config.target_modules = {row.target for row in made.rows if not row.raw}
        solved = peft_config.budget is not None
        peft_config.solved_ranks = {row.name: list(row.ranks) for row in made.rows} if solved else None
        peft_config.sites = {row.name: row.site.to_dict() for row in made.rows}
        self.__dict__.setdefault("_plans", {})[name] = made

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
        # a layer that only a state_dict names is not in the plan
        rows = self._plans[adapter_name].rows_of(key) or make_plan(self.model, peft_config, keys=[key]).rows
        rows = [row for row in rows if not row.raw]  # those come by _inject_parameters
        if rows:
            wrap(self.model, rows, adapter_name, peft_config)

    def _inject_parameters(
        self, peft_config: FloraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        rows = [row for row in self._plans[adapter_name].rows if row.raw]
        around = tuple(f"{row.module}." for row in rows)
        # of a second adapter: PEFT does not look for layers within what the first one has wrapped
        within = [row for row in self._plans[adapter_name].rows if not row.raw and row.module.startswith(around)]
        for some in (within, rows):
            for module in dict.fromkeys(row.module for row in some):
                mine = [row for row in some if row.module == module]
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    wrap(model, mine, adapter_name, peft_config)
        names = [row.target for row in rows]
        # PEFT 0.20 leaves the bookkeeping to this method; later ones do it with what is returned
        self.targeted_parameter_names.extend(n for n in names if n not in self.targeted_parameter_names)
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # a CoreSpace is made where its weight is: nothing to move

    # --------------------------------------------------------------------------------------------------- adapters

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._plans.pop(adapter_name, None)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose update is the weighted sum of others', by cores on the block diagonal.

        "linear" and "cat" are the same sum here, which is exact: the ranks add up, and where they would pass a mode's
        size they are cut to it without loss (``tucker.block_sum``). "svd" rounds that sum to the ranks of the first of
        the adapters that a layer has, or to ``svd_rank`` in every mode but the kernel's: to the nearest of these ranks
        for a matrix, by HOOI for more modes (``tucker.round_ranks``).
        """
        if combination_type not in ("linear", "cat", "svd"):
            raise ValueError(f"combination_type must be one of linear, cat, svd, got {combination_type!r}")
        if svd_rank is not None and combination_type != "svd":
            raise ValueError(f"svd_rank={svd_rank!r} is for combination_type='svd', got {combination_type!r}")
        check_rank("svd_rank", svd_rank, none=True, many=False)
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: one weight an adapter is needed")
        if missing := sorted(set(adapters) - set(self.peft_config)):
            raise ValueError(f"adapters {missing} do not exist; there are {sorted(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} exists already; choose another name")
        saved = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        if twice := [module for module in saved if len(set(adapters) & set(module.modules_to_save)) > 1]:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{len(twice)} such instance(s)."
            )
        sums = {}
        for layer in self._layers():
            present = [
                (name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.tucker_space
            ]
            if present:
                scale, core, factors = _weighted_sum(layer, present)
                if combination_type == "svd":
                    core, factors = tucker.round_ranks(core, factors, _rounded_ranks(layer, present[0][0], svd_rank))
                sums[layer.name] = scale, core, factors
        rows = [row for name in adapters for row in self._plans[name].rows]
        full = [module for name in adapters for module in self.peft_config[name].modules_to_save or ()]
        config = replace(
            self.peft_config[adapters[0]],
            r=1,
            budget=None,
            rank_pattern={},
            scale_pattern={},
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            target_modules={row.target for row in rows if not row.raw},
            target_parameters={row.target for row in rows if row.raw} or None,
            modules_to_save=list(dict.fromkeys(full)) or None,
            ranks={name: list(core.shape) for name, (_, core, _) in sums.items()},
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in self._layers():
            if adapter_name in layer.tucker_space:
                scale, core, factors = sums[layer.name]
                layer.tucker_space[adapter_name].assign(core, factors)
                layer.tucker_space[adapter_name].scale.copy_(scale)
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                for source in set(adapters) & set(module.modules_to_save):  # the one that has trained it, if any
                    module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())

    def _layers(self) -> Iterator[FloraLayer]:
        return (module for module in self.model.modules() if isinstance(module, FloraLayer))

    # ---------------------------------------------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_finite(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_finite(adapter_names, safe_merge)
        for name, layer in reversed(list(self.model.named_modules())):
            parent, _, leaf = name.rpartition(".")
            # PEFT does not look within wrapped layers, nor for a path that has changed while it went on
            if isinstance(layer, FloraLayer) and ".base_layer." in f"{parent}." and leaf != "base_layer":
                base = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                setattr(self.model.get_submodule(parent), leaf, base)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_finite(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Look at every layer before the first one is merged: a model is merged whole or not at all."""
        for layer in self._layers():
            layer.check_mergeable(adapter_names, safe_merge)

    # ------------------------------------------------------------------------------------------------ mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names=`` of a forward or generate call to every layer, as PEFT's LoRA does."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {adapter for layer in self._layers() for adapter in layer.tucker_space}
        if unknown := sorted({name for name in names if name != "__base__"} - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # beam search repeats each sample, but not for an encoder of its own, which runs before the beams part
        single = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        inner = {layer.base_layer for layer in self._layers()}  # these hear the names from the layer around them
        handles = []
        for module in self.model.modules():
            if isinstance(module, (FloraLayer, AuxiliaryTrainingWrapper)) and module not in inner:
                repeated = list(names) if module in single else [name for name in names for _ in range(beams)]
                handles.append(module.register_forward_pre_hook(partial(_pass_names, names=repeated), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _name_of(peft_config: FloraConfig, configs: dict[str, Any]) -> str:
    """The adapter that is being added with this config: the latest one, where it served for others before."""
    return next(name for name, config in reversed(configs.items()) if config is peft_config)


def _pass_names(module: nn.Module, args: tuple, kwargs: dict, names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = names
    return args, kwargs


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: nn.TransformerEncoderLayer's fast path reads weights past our forward, but not where a
    hook is registered."""


def wrap(model: nn.Module, rows: Sequence[Row], adapter_name: str, config: FloraConfig) -> None:
    """Give the weights of one module an adapter: one FloraLayer a weight, the first weight's outermost."""
    parent, layer, name = _get_submodules(model, rows[0].module)
    wrapped: dict[str, FloraLayer] = {}
    inner = layer
    while hasattr(inner, "base_layer"):
        if isinstance(inner, FloraLayer):
            wrapped[inner.parameter_name] = inner
        inner = inner.base_layer
    for row in reversed(rows):
        if row.parameter not in wrapped:
            layer = wrapped[row.parameter] = FloraLayer(layer, row.name, row.parameter, shared=row.shared)
            layer.training = layer.base_layer.training
            if isinstance(parent, nn.TransformerEncoderLayer):
                layer.register_forward_pre_hook(_no_fast_path)
        if adapter_name not in wrapped[row.parameter].tucker_space:
            wrapped[row.parameter].update_layer(
                adapter_name,
                row.ranks,
                scale=row.scale,
                init=config.init if config.init_weights else "random",
                dropout=config.dropout,
                execution=config.execution,
                inference_mode=config.inference_mode,
            )
    setattr(unwrapped(parent), name, layer)


def _weighted_sum(layer: FloraLayer, present: Sequence[tuple[str, float]]):
    """(scale, core, factors) of the weighted sum of a layer's updates, under the first one's scale."""
    spaces = [layer.tucker_space[name] for name, _ in present]
    scale = spaces[0].scale.clone()
    weights = [
        weight * layer.tucker_scaling[name] * (space.scale / scale).item()
        for (name, weight), space in zip(present, spaces, strict=True)
    ]
    wide = torch.promote_types(spaces[0].core.dtype, torch.float32)
    core, factors = tucker.block_sum([(s.core.to(wide), [f.to(wide) for f in s.factors]) for s in spaces], weights)
    return scale, core, factors


def _rounded_ranks(layer: FloraLayer, adapter: str, svd_rank: int | None) -> list[int]:
    """The adapter's ranks, ``svd_rank`` in their place for every mode but the kernel's."""
    ranks = layer.tucker_space[adapter].ranks
    return [
        rank if svd_rank is None or role == "kernel" else svd_rank
        for rank, role in zip(ranks, layer.roles, strict=True)
    ]
