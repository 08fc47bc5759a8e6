"""The fields of ``FloraConfig``, which are also the keys of a job's YAML and of ``flora plan``.

They are apart from it because PEFT takes seconds to import, and a help page does not need it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1


@dataclass
class FloraFields:
    """Each with its help."""

    r: int | list[int] | None = field(
        default=None,
        metadata={"help": "Rank of every mode but the kernel's, or one rank per mode. Never above the mode's size."},
    )
    kernel_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of the kernel modes (the paper's r3). Default: half the mode, rounded up."},
    )
    budget: int | float | None = field(
        default=None,
        metadata={
            "help": "In place of r: trainable parameters of all targets together (int), or a share of the base "
            "model's parameters (float in (0, 1]). Ranks are solved for."
        },
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names or regex of the layers to adapt; 'all-linear'; 'all-weights' for every supported layer "
            "except the output head. Default: LoRA's where PEFT has one for the model's type (for many language models "
            "the query and value projections), else 'all-weights'."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of layers not to adapt."}
    )
    target_parameters: list[str] | set[str] | None = field(
        default=None, metadata={"help": "Names of raw parameters to adapt, of 1 to 6 modes (stacked experts, say)."}
    )
    rank_pattern: dict[str, Any] | None = field(
        default_factory=dict, metadata={"help": "Layer name or regex -> rank, or one rank per mode."}
    )
    scale: float | str = field(
        default="auto",
        metadata={"help": "The s of equation 5, or 'auto': one rule for every weight of every backbone."},
    )
    scale_pattern: dict[str, Any] | None = field(
        default_factory=dict, metadata={"help": "Layer name or regex -> scale."}
    )
    init: str = field(
        default="factor",
        metadata={
            "help": "'core' (the paper: core zero), 'factor' (LoRA's: output factor zero), 'gradient' and "
            "'activations' (from data: see flora.initialize), 'official' and 'official-normal' (the authors'). A fresh "
            "adapter changes no output with any of them."
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False: start with an adapter that has an effect (for tests)."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout of the update's input; of the ranks where the update acts as a weight."},
    )
    execution: str = field(
        default="auto",
        metadata={"help": "'factored' (thin products), 'merged' (W + delta), or 'auto': the cheaper for each input."},
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'flora_only'."})
    stack: str | None = field(
        default=None,
        metadata={
            "help": "'layers': weights of one shape whose names differ in the layer's number alone share factors; each "
            "has a core of its own. For small budgets."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers to train fully and save, such as a new head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts in."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train fully."}
    )
    ranks: dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Written by flora: the ranks that a budget or a sum of adapters came to, weight by weight."},
    )
    scales: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Written by flora: the scale of each weight, which takes the place of `scale`."},
    )
    weights: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Written by flora: kind and options of each adapted weight, for flora.convert."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Written by flora."})
