"""What a config names and the plan leaves out: each with the reason, and a warning where a user would not expect it."""

from __future__ import annotations

import inspect
import re
import warnings
from difflib import get_close_matches
from types import CodeType

from torch import nn

from flora.layers import kinds
from flora.tuner.config import FloraConfig
from flora.tuner.peft_compat import SEQ_CLS_HEAD_NAMES
from flora.tuner.planning.targets import HEAD_TASKS, SHORTHANDS, Target, every_name


def left_out(model: nn.Module, config: FloraConfig, targets: list[Target]) -> dict[str, str]:
    """Those of the targets that are not adapted, by name, and why: what a shorthand cannot mean, and a weight that the
    model holds under another name and never uses under this one (T5's and BART's ``shared``).

    Warns of all but weights that a shorthand leaves to other modules. Raises ValueError if nothing else is named.
    """
    reasons: dict[str, str] = {}
    used: set[str] | None = None
    for target in targets:
        if config.target_modules in SHORTHANDS and not target.raw:
            if target.shared:
                reasons[target.name] = _SHARED
            elif reason := _why_not(target):
                reasons[target.name] = reason
        elif target.shared and config.saved_shapes is None:
            used = _names_in_code(model) if used is None else used
            if target.module.rpartition(".")[2] not in used:
                reasons[target.name] = "the model uses this weight under other names only; target those"
    for name, reason in reasons.items():
        if config.target_modules not in SHORTHANDS and len(reasons) == len(targets):
            raise ValueError(f"layer {name!r} can't be adapted: {reason}")
        if reason != _SHARED:
            warnings.warn(f"layer {name!r} is left out: {reason}", stacklevel=2)
    return reasons


def _why_not(target: Target) -> str | None:
    try:
        kinds.describe(target.layer, target.parameter)
    except ValueError as error:
        return str(error)
    return None


_SHARED = "other modules hold this weight, too"
# methods that hold a module and do not run it
_HOLDERS = re.compile(r"__init__|_?tie_.*|_?init_.*|post_init|[gs]et_(in|out)put_embeddings|_?resize_.*")


def _names_in_code(model: nn.Module) -> set[str]:
    """Every attribute and name in the code of the model's classes, except where a module is only held."""
    names = {part for name, _ in model.named_modules() for part in name.split(".") if part.isdigit()}
    codes: list[CodeType] = []
    for cls in {base for module in model.modules() for base in type(module).__mro__}:
        for name, function in vars(cls).items():
            if inspect.isfunction(function) and not _HOLDERS.fullmatch(name):
                codes.append(inspect.unwrap(function).__code__)
    while codes:
        code = codes.pop()
        names.update(code.co_names, (constant for constant in code.co_consts if isinstance(constant, str)))
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def check_names(model: nn.Module, config: FloraConfig) -> None:
    """Warn of each name in the config that no module has, and suggest the nearest one."""
    layers = [name for name, _, _ in every_name(model) if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        entries = getattr(config, field)
        for entry in sorted(entries) if isinstance(entries, (list, set, tuple)) else ():
            # PEFT takes the end of a name for modules_to_save, and whole parts of one for the others
            end = entry if field == "modules_to_save" else f".{entry}"
            if any(name == entry or name.endswith(end) for name in layers) or _is_peft_s(config, field, entry):
                continue
            length = entry.count(".") + 1
            ends = {".".join(name.split(".")[-length:]) for name in layers}
            near = get_close_matches(entry, sorted(ends), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            warnings.warn(f"{field}: no module of the model is called {entry!r}{hint}", stacklevel=2)


def _is_peft_s(config: FloraConfig, field: str, entry: str) -> bool:
    """Whether PEFT itself has put the name there: it names heads that any model might have."""
    return (
        field == "modules_to_save" and config.task_type in HEAD_TASKS and entry in (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
    )
