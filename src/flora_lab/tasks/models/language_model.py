"""A task's language model and its tokenizer: from a folder, the hub or a config, in 32, 16 or 4 bits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from flora_lab.tasks.models.pretrained import Pretrained, brief, make_config

if TYPE_CHECKING:
    from torch import nn

FLOATS = ("float32", "bfloat16", "float16")


@dataclass
class LanguageModel(Pretrained):
    dtype: str = field(
        default="float32", metadata={"help": "of the frozen weights; what is trained has float32", "choices": FLOATS}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "quantize the frozen weights to nf4 (QLoRA), which computes in dtype"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "a folder or hub name; default: name's, or bytes for a config", "path": True}
    )

    def __post_init__(self):
        if self.load_in_4bit and not self.name:
            raise ValueError("task.model.load_in_4bit=true: expected task.model.name, a model with weights to quantize")

    def build(self, kind: str, dense: Sequence[str] = ()) -> nn.Module:
        """The model as transformers' Auto class ``kind``. ``dense``: names of parts that are not to be quantized.

        Raises ValueError naming the model.
        """
        model = self._loaded(kind, dense)
        # training needs no cache of keys and values, and with one transformers takes packed examples for one text
        model.config.get_text_config().use_cache = False
        return model

    def _loaded(self, kind: str, dense: Sequence[str]) -> nn.Module:
        import torch

        dtype = getattr(torch, self.dtype)
        if not self.name:
            return self.load(kind, ()).to(dtype)
        keys = {"dtype": dtype, "ignore_mismatched_sizes": False}
        if not self.load_in_4bit:
            return self.load(kind, (), **keys)
        from peft import prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        if dense:  # by name for transformers 4, by pattern for 5; and the output layer, no longer left out by itself
            names = [pattern for name in dense for pattern in (name, rf"(.*\.)?{re.escape(name)}")]
            nf4["llm_int8_skip_modules"] = [*names, "lm_head"]
        model = self.load(kind, (), quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4), **keys)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    @cached_property
    def config_of_text(self) -> Any:
        """The config of the model, or of its part that reads text. Raises ValueError naming the model."""
        from transformers import AutoConfig

        self.check()
        try:
            config = AutoConfig.from_pretrained(self.source()) if self.name else make_config(self.config)
        except Exception as error:  # a model's own code may raise anything
            raise self.fault(brief(error, self.name)) from error
        return config.get_text_config()

    @property
    def positions(self) -> int | None:
        """The most tokens that the model reads; None if it has no limit."""
        return getattr(self.config_of_text, "max_position_embeddings", None)

    @property
    def reader(self) -> str:
        """The key that the tokenizer or processor is given by, for messages."""
        if not self.tokenizer and not self.name:
            return "the tokenizer of bytes"
        return f"task.model.tokenizer={self.tokenizer}" if self.tokenizer else f"task.model.name={self.name}"

    def load_tokenizer(self) -> Any:
        """The tokenizer; one of bytes for a model that is given by its config alone. Raises ValueError naming it."""
        from transformers import AutoTokenizer, ByT5Tokenizer

        self.check()
        if not (name := self.tokenizer or self.name):
            return ByT5Tokenizer(extra_ids=0)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(Pretrained(name=name).source()))
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"{self.reader}: {brief(error, name)}") from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if its file is missing
            raise ValueError(f"{self.reader} has no tokenizer")
        if tokenizer.eos_token is None:
            raise ValueError(f"{self.reader}: the tokenizer has no token for the end of a text (eos_token)")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def in_float32(part: nn.Module) -> None:
    """Convert a part of a model in place. It still takes and returns the model's own floats.

    PEFT does so for adapters (``autocast_adapter_dtype``), but not for ``modules_to_save``.
    """
    import torch
    from accelerate.utils import convert_to_fp32

    if (dtype := next(part.parameters()).dtype) != torch.float32:
        part.float()
        part.register_forward_pre_hook(lambda part, args, kwargs: convert_to_fp32((args, kwargs)), with_kwargs=True)
        part.register_forward_hook(partial(_converted, dtype))


def _converted(dtype: Any, part: nn.Module, args: tuple, output: Any) -> Any:
    """The output with its floating tensors as ``dtype``."""
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, output)
