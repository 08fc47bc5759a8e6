"""What is checked before the first hour of training: everything that could be refused later."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import nn

from flora import FloraConfig
from flora.keys import Refused, pattern_limit
from flora.text import did_you_mean
from flora.tuner.config import OTHER_NAMES
from flora_lab.errors import ConfigError
from flora_lab.loading import of_source, one_line, with_key
from flora_lab.methods import CannotAdapt
from flora_lab.methods.common import is_quantized
from flora_lab.run.fit import arguments, first_steps, no_accelerator, steps
from flora_lab.run.folder import Pair, pairs
from flora_lab.run.trial import set_up
from flora_lab.settings import Config, Training
from flora_lab.tasks import Examples, Task

Reasons = dict[Pair, str | None]  # why a variant can't run at a budget, None if it can


def preflight(config: Config, variants: list[str], budgets: list[int]) -> Reasons:
    """Check data, model and training arguments, set up every variant at every budget once, and try its first steps.

    A method without a size to choose has the budget None. Raises ConfigError naming the variant and its option, or the
    file and row of the data. If every variant is left out, raises ConfigError with the first one's reason.
    """
    _check_engine(config)
    _say_slow(config)
    task = None
    try:
        for task in filter(None, [config.task.source_task(), config.task]):
            splits = task.splits(config.seed)
            task.check(splits)
            keys = config.training if task is config.task else config.pretraining
            few = _few(splits["train"], keys.batch_size)
            finite = _forward(task, few, keys, len(splits["train"]))
            _release()
        _match_patterns(config, variants)
        total = steps(config.training, splits["train"])
        for key in ("pretraining", "training"):
            try:
                arguments(getattr(config, key), total, config.seed, Path(config.output))
            except ValueError as error:
                raise ConfigError(f"{key}: {one_line(error)}") from error
        reasons: Reasons = {}
        for name, budget in pairs(config, variants, budgets):
            reasons[name, budget] = _reason(config, name, budget, total, few, finite)
            _release()
    except ValueError as error:
        message = str(error) if isinstance(error, ConfigError) else with_key(config, error)
        raise ConfigError(message if task is config.task else of_source(message)) from error
    if all(reasons.values()):
        (name, _), reason = next(iter(reasons.items()))
        raise ConfigError(f"methods.{name}: {reason}")
    return reasons


def _check_engine(config: Config) -> None:
    """Refuse what the main process can't do alone while the launcher's engine holds the weights in shards."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise ConfigError("DeepSpeed's ZeRO-3 leaves no process a whole model to save and test: take FSDP2")
    if _is_sharded() and config.comparison.norms:
        raise ConfigError(f"comparison.norms={config.comparison.norms}: no process has a whole weight under FSDP")


def _say_slow(config: Config) -> None:
    """A processor without instructions for bfloat16 took 15 times as long for MiniLM's steps as in float32."""
    slow = [key for key in ("pretraining", "training") if getattr(config, key).mixed_precision == "bf16"]
    if slow and no_accelerator() and not fast_bfloat16() and PartialState(cpu=True).is_main_process:
        keys = " and ".join(f"{key}.mixed_precision" for key in slow)
        print(f"{keys}: this processor has no instructions for bf16; 'no' is many times faster", file=sys.stderr)


def fast_bfloat16() -> bool:
    """Whether the CPU's kernels take bfloat16; without, PyTorch computes element by element."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _is_sharded() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def say_left_out(reasons: Reasons, main: bool) -> None:
    """Tell now, before hours of training, what will be missing in the end."""
    for (name, budget), reason in reasons.items():
        if reason and main:
            print(f"{name} is left out{f' at {budget} parameters' if budget else ''}: {reason}", file=sys.stderr)


def _match_patterns(config: Config, variants: list[str]) -> None:
    """Match every regex with the names of the model's layers once: methods do it a hundred times, without a limit."""
    options = {f"methods.{variant}: ": config.methods[variant].options for variant in variants}
    options[""] = {"target_modules": config.target_modules}
    given = {place: patterns for place, keys in options.items() if (patterns := list(_patterns(keys)))}
    names = [name for name, _ in config.task.build().named_modules()] if given else []  # a large model takes a while
    for place, patterns in given.items():
        try:
            with pattern_limit(), suppress(re.error):  # which the method will report
                for pattern in patterns:
                    for name in names:
                        re.fullmatch(rf"(.*\.)?({pattern})", name)
        except Refused as error:
            raise ConfigError(f"{place}{error}") from error


def _patterns(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, str) and key in ("target_modules", "exclude_modules"):
            yield value
        elif isinstance(value, dict) and key.endswith("_pattern"):
            yield from map(str, value)


def _reason(
    config: Config, variant: str, budget: int | None, total: int, few: list[dict[str, Any]], finite: bool
) -> str | None:
    """Why the variant can't run, or None.

    Args:
        total: optimizer steps of the training.
        few: examples to try the first steps on: much in third parties' code fails there, and not before.
        finite: whether the model without adapters has a finite loss on them; few examples may have no label at all.
    """
    base = config.task.build()
    numbers = " on quantized weights" if is_quantized(base) else ""
    try:
        adapted = set_up(config, variant, budget, base, total)
    except CannotAdapt as error:
        return str(error)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError is torch's
        raise ConfigError(f"methods.{variant}: {one_line(error)}{_hint(error)}") from error
    if _is_sharded():  # a process that fails alone would leave the others waiting for its shards
        return None
    try:
        first_steps(adapted.model, config.task, few, config.training, adapted.optimizer)
    except Exception as error:
        if isinstance(error, FloatingPointError) and not finite:
            return None
        return f"its first steps fail{numbers}: {one_line(error)}"
    return None


def _hint(error: Exception) -> str:
    """For "XConfig.__init__() got an unexpected keyword argument 'y'": the field of XConfig that was meant."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    config = match and (FloraConfig if match[1] == "FloraConfig" else getattr(peft, match[1], None))
    if not match or not is_dataclass(config):
        return ""
    names = OTHER_NAMES if config is FloraConfig else dict.fromkeys(("rank", "dim"), "r")
    return did_you_mean(match[2], [field.name for field in fields(config)], names)


def _few(examples: Examples, batch_size: int) -> list[dict[str, Any]]:
    """As few as the smallest batch of an epoch has, but for two, if it has more."""
    return [examples[index] for index in range(min(_last(len(examples), batch_size), 2))]


def _last(count: int, batch_size: int) -> int:
    """How many examples the last batch of an epoch has."""
    return count % batch_size or batch_size


def _forward(task: Task, few: list[dict[str, Any]], keys: Training, count: int) -> bool:
    """Pass a batch of ``few`` of the ``count`` examples through the model, where it will be trained.

    Returns:
        whether its loss is finite.
    """
    model = task.build().train()
    if keys.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"training.gradient_checkpointing=true: {type(model).__name__} does not support it")
    try:
        with torch.no_grad():
            device = _place(model)
            outputs = model(**send_to_device(task.collate(few), device))
    except Exception as error:  # a model's own code may raise anything
        failure = f"a batch of {len(few)} does not pass through the model: {one_line(error)}"
        last = _last(count, keys.batch_size)
        raise ConfigError(f"{failure} (the last batch of {count} examples has {last})") from error
    return bool(next(iter(outputs.values())).isfinite().all())


def _place(model: nn.Module) -> torch.device:
    """Move the model to the device that Trainer will take, unless it is for shards and may not fit there whole."""
    here = next(model.parameters()).device
    device = PartialState(cpu=no_accelerator()).device
    if _is_sharded() or here.type == device.type:
        return here
    model.to(device)
    return device


def _release() -> None:
    """Give back what models held of the accelerator's memory: trials may run in other processes."""
    if not no_accelerator():
        clear_device_cache(garbage_collection=True)
