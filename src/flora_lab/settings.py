"""The keys of a job: one tree of dataclasses for the YAML, its overrides on the command line, and their help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flora_lab.methods import METHODS

SEEDS = 2**32 - 1  # the largest that numpy takes


# Metadata of a field: "help", for `--help`; limits of its value ("least", "most", "above", "choices"), of each element
# if it is a list; "path": a file or folder, in which ~ is expanded.


@dataclass
class Training:
    epochs: int = field(default=20, metadata={"help": "passes over the training split", "least": 1})
    max_steps: int | None = field(default=None, metadata={"help": "stop after this many optimizer steps", "least": 1})
    batch_size: int = field(default=32, metadata={"help": "examples per step and process", "least": 1})
    eval_batch_size: int | None = field(
        default=None, metadata={"help": "in evaluation; default: batch_size", "least": 1}
    )
    loaders: int = field(default=0, metadata={"help": "worker processes that load examples", "least": 0})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule", "above": 0})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up", "least": 0})
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW", "least": 0})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16", "choices": ("no", "bf16", "fp16")})
    eval_steps: int | None = field(
        default=None, metadata={"help": "steps between two evaluations and checkpoints; default: an epoch", "least": 1}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "save memory: compute activations again in the backward pass"}
    )

    def __post_init__(self):
        if self.mixed_precision == "False":  # YAML reads a bare no as False
            self.mixed_precision = "no"

    def decisive(self) -> dict[str, Any]:
        """The keys on which a training's numbers depend."""
        return {
            key: value for key, value in asdict(self).items() if key not in ("eval_steps", "gradient_checkpointing")
        }


@dataclass
class Variant:
    """A method with its options, under a name of the user's."""

    method: str | None = field(default=None, metadata={"help": "the method, if NAME is not one"})
    learning_rate: float | None = field(default=None, metadata={"help": "instead of the training's", "above": 0})
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of the method's config, such as LoraConfig or FloraConfig"}
    )


@dataclass
class Comparison:
    """What `flora compare` varies. Every variant gets the same number of trials."""

    budgets: list[int] = field(default_factory=list, metadata={"help": "several, instead of budget", "least": 1})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "of the head, the adapter and the order of examples", "least": 0, "most": SEEDS},
    )
    rates: list[float] = field(
        default_factory=lambda: [0.3, 1, 3],
        metadata={
            "help": "multiples of a variant's learning rate; rate_seeds try all, validation chooses",
            "above": 0,
        },
    )
    rate_seeds: int = field(
        default=1,
        metadata={"help": "how many of the seeds, from the first, try all rates; their mean decides", "least": 1},
    )
    engine: str = field(default="local", metadata={"help": "local or ray", "choices": ("local", "ray")})
    workers: int = field(default=1, metadata={"help": "trials that run at the same time", "least": 1})
    norms: int = field(default=0, metadata={"help": "how often to measure the updates per trial", "least": 0})


@dataclass
class Config:
    task: Any = field(default_factory=dict, metadata={"help": "the task, by name, and its own keys"})
    output: str = field(default="runs/default", metadata={"help": "folder for all results", "path": True})
    cache: str = field(
        default="runs/cache", metadata={"help": "folder of base models, shared between jobs", "path": True}
    )
    mirror: str | None = field(
        default=None, metadata={"help": "URL of fsspec (s3://, gs://, …) where a copy of output is kept and taken from"}
    )
    fresh: bool = field(default=False, metadata={"help": "delete the earlier results in output, and start over"})
    seed: int = field(
        default=0, metadata={"help": "of the splits, the weights and the order of examples", "least": 0, "most": SEEDS}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: torch's choice", "least": 1})
    budget: int = field(
        default=10_000, metadata={"help": "trainable parameters of an adapter, without the head", "least": 1}
    )
    target_modules: Any = field(default=None, metadata={"help": "what to adapt, instead of the task's choice"})
    pretraining: Training = field(default_factory=Training)
    training: Training = field(default_factory=Training)
    comparison: Comparison = field(default_factory=Comparison)
    methods: dict[str, Variant] = field(
        default_factory=dict, metadata={"help": f"the variants to train, by name: {', '.join(METHODS)}"}
    )

    def method_of(self, variant: str) -> str:
        """The key in `METHODS` of a variant's method."""
        return self.methods[variant].method or variant
