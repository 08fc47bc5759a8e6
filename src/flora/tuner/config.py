"""``FloraConfig``: the user's settings, checked. Its fields are in ``flora.fields``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from flora.fields import FORMAT_VERSION, FloraFields
from flora.files import finish_replacing, replace_file, saved_shapes
from flora.layers.execution.cost import EXECUTIONS
from flora.layers.starts import STARTS
from flora.tuner.checks import (
    check_budget,
    check_choice,
    check_names,
    check_patterns,
    check_rank,
    check_scale,
    check_scales,
    check_types,
    is_number,
)
from flora.tuner.peft_compat import FLORA, KEY_MAPPING
from flora.tuner.renaming import rename

STACKS = (None, "layers")
INITS = tuple(name for name in STARTS if name != "random")
BIASES = ("none", "all", "flora_only")
CHECKED = (
    "r", "kernel_rank", "budget", "target_modules", "exclude_modules", "target_parameters", "rank_pattern", "scale",
    "scale_pattern", "scales", "init", "init_weights", "dropout", "execution", "bias",
)  # fmt: skip
# what other methods call our fields
OTHER_NAMES = {
    "rank": "r", "dim": "r", "lora_r": "r", "network_dim": "r", "alpha": "scale", "lora_alpha": "scale",
    "scaling": "scale", "alpha_pattern": "scale_pattern", "lora_dropout": "dropout", "init_lora_weights": "init",
}  # fmt: skip


@dataclass
class FloraConfig(FloraFields, PeftConfig):
    """Configuration of a FLoRA adapter (paper section 4).

    Exactly one of ``r`` and ``budget`` says how large the adapter is; with neither, ``r`` is 8.

    Raises:
        ValueError: naming the field, the value given and what is accepted.
    """

    # Not fields, so that a config used for a second model, or as the pattern of another, starts without them. A copy
    # could not hold them either: PEFT keeps the object that the user gave.
    saved_shapes = cast(dict[str, tuple[int, ...]] | None, None)  # name -> shape, of the file that is being loaded
    plan = cast(Any, None)  # the ``planning.Plan`` of the model that it was last used for

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FLORA
        check_types(self, without=CHECKED)
        for name in ("target_modules", "exclude_modules", "target_parameters"):
            value = getattr(self, name)
            check_names(name, value, regex=name != "target_parameters")
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.r is None and self.budget is None:
            self.r = 8
        elif self.r is not None and self.budget is not None:
            raise ValueError(f"r={self.r} and budget={self.budget}: give one of them, they exclude each other")
        if self.r is not None:
            check_rank("r", self.r)
        check_rank("kernel_rank", self.kernel_rank, none=True, many=False)
        check_budget(self.budget)
        check_scale("scale", self.scale)
        for name, check in (("rank_pattern", check_rank), ("scale_pattern", check_scale)):
            setattr(self, name, getattr(self, name) or {})
            check_patterns(name, getattr(self, name), check)
        check_scales(self.scales)
        check_choice("init", self.init, INITS)
        check_choice("execution", self.execution, EXECUTIONS)
        check_choice("bias", self.bias, BIASES)
        check_choice("stack", self.stack, STACKS)
        if self.stack is not None and STARTS[self.init].from_data:
            raise ValueError(f"init={self.init!r} starts each layer by itself, but stack={self.stack!r} shares factors")
        if not isinstance(self.init_weights, bool):
            raise ValueError(
                f"init_weights must be true or false, got {self.init_weights!r}; the start is chosen by init"
            )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. Got {self.target_modules!r}; "
                    "give a list of names"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    @classmethod
    def like(cls, other: PeftConfig, model: nn.Module | None = None, **changes: Any) -> FloraConfig:
        """The FLoRA of the targets and size of another PEFT method's config: ``like(LoraConfig(...), model)``.

        Targets, exclusions, layers trained whole, biases, dropout and task carry over. A LoRA's alpha does not: the
        scale stays "auto", which suits LoRA's learning rates.

        Args:
            other: of a method that adapts layers: LoRA (DoRA, rsLoRA, PiSSA …), LoHa, LoKr, OFT and others.
            model: the base model, which stays as it is. With it the budget is the number of trainable parameters that
                ``other`` has on this model, layer by layer where ``rank_pattern`` tells layers apart. Without it the
                ranks are the same, at which FLoRA has slightly more parameters than LoRA on linear layers, and fewer on
                convolutions.
            changes: fields that replace those found, such as ``init="gradient"``.

        Raises:
            ValueError: if the method adapts no layers (prompt tuning), or has no rank and there is no model.
        """
        from flora.tuner.like import config_like

        return config_like(other, model, changes)

    @property
    def start(self) -> str:
        """A key of ``starts.STARTS``."""
        return self.init if self.init_weights else "random"

    def to_dict(self) -> dict[str, Any]:
        """For JSON. After a model has been adapted, it has the adapted weights, their scales and a budget's ranks."""
        fields = super().to_dict()
        if self.plan is not None:
            fields["weights"] = {weight.name: weight.site.to_dict() for weight in self.plan.rows}
            fields["scales"] = dict(self.plan.scales)
            if self.budget is not None:
                fields["ranks"] = {weight.name: list(weight.ranks) for weight in self.plan.rows}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, whole or not at all."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; a folder is needed")
        content = self.to_dict()
        if (auto_mapping := kwargs.get("auto_mapping_dict")) is not None:
            content["auto_mapping"] = auto_mapping
        with replace_file(folder / "adapter_config.json") as path:
            path.write_text(json.dumps(content, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> FloraConfig:
        """As PEFT's. Raises ValueError if the adapter's file is broken, or is no FLoRA adapter."""
        finish_replacing(Path(pretrained_model_name_or_path, subfolder or ""))
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}: its adapter_config.json is corrupt: {error}") from error
        # A file that is broken, or of another base model, must be refused before any layer is wrapped. Only here does
        # PEFT tell a tuner the path that it will load.
        download, _, _ = cls._split_kwargs(kwargs)
        shapes = saved_shapes(pretrained_model_name_or_path, subfolder, **download)
        if not kwargs.get("ignore_mismatched_sizes"):
            config.saved_shapes = shapes
        if mapping := KEY_MAPPING.get():
            rename(config, mapping)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's. Raises ValueError for an adapter that a newer flora has written."""
        version = kwargs.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"the adapter has format {version!r}, this flora reads up to {FORMAT_VERSION}; upgrade with "
                "`pip install -U flora-peft`"
            )
        return super().check_kwargs(**kwargs)
