"""The model card, README.md beside a saved adapter: what the adapter is, how to load it and where else it can be used.

flora's part stands between two marks and is written anew at each save. All the rest is PEFT's or the user's and stays.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from flora.text import sizes

START, END = "<!-- flora writes this part anew at each save -->", "<!-- end of flora's part -->"
RANKS_SHOWN = 6  # kinds of layers, each with its smallest and largest ranks

_PART = """{start}
## The adapter

This is a FLoRA adapter of {base}, for `pip install flora-peft`.

{facts}

Load it, with this folder or its name on the hub in the place of `"."`:

```python
import flora
{imports}

{load}
```

For programs without flora:

- `flora export lora . OUT` writes a plain PEFT LoRA, exactly, or lists the layers that have no LoRA form;
- `flora export locon . OUT.safetensors` and `flora export diffusers . OUT` write other formats;
- `flora merge {merge_base} . OUT` merges the adapter into the model.
{end}
"""


def fill_card(path: Path, model: Any, adapters: list[str], fresh: bool) -> None:
    """Write flora's part into a model card.

    Args:
        path: the card, as PEFT has written it.
        model: the PeftModel that is saved.
        adapters: the names of its FLORA adapters in this folder.
        fresh: whether there was no card before: then PEFT's form of unanswered questions makes way.
    """
    if not path.is_file():
        return
    front, mark, body = "", "", path.read_text(encoding="utf-8")
    if body.startswith("---\n"):
        front, mark, body = body.partition("\n---\n")
    part = _part(model, adapters, front)
    if fresh:
        versions = body[body.index("### Framework versions") :] if "### Framework versions" in body else ""
        body = f"\n# FLoRA adapter of {_base_name(model) or _class(model)}\n\n{part}\n{versions}"
    elif START in body:
        before, _, rest = body.partition(START)
        body = before + part + rest.partition(END)[2].lstrip("\n")
    elif "import flora" not in body:
        body = f"{part}\n{body}"
    path.write_text(f"{front}{mark}{body}", encoding="utf-8")


def _part(model: Any, adapters: list[str], front: str) -> str:
    name, cls = _base_name(model), _class(model)
    base = f"`{name}`" if name else f"a `{cls}`"
    data = re.search(r"^datasets:\n((?:- .*\n?)+)", f"{front}\n", re.MULTILINE)
    trained_on = data and ", ".join(line.removeprefix("- ") for line in data[1].strip().splitlines())
    imports, load = _loading(model.get_base_model(), name, cls)
    facts = [_facts(model, adapter, name or cls, trained_on) for adapter in adapters]
    if len(adapters) > 1:
        facts = [f"`{adapter}`:\n\n{fact}" for adapter, fact in zip(adapters, facts, strict=True)]
    return _PART.format(
        start=START, end=END, base=base, facts="\n\n".join(facts), imports=imports, load=load, merge_base=name or "BASE"
    )


def _facts(model: Any, adapter: str, base: str, trained_on: str | None) -> str:
    """The table of one adapter."""
    config = model.peft_config[adapter]
    plan = config.plan
    if plan is None:
        return ""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}  # PEFT lists names that a head may have
    whole = [f"`{name}`" for name in config.modules_to_save or () if name.rpartition(".")[2] in leaves]
    size = f"budget={config.budget}: " if config.budget is not None else f"r={config.r}: "
    size += f"{plan.total:,} parameters in {len(plan.rows)} weights, {100 * plan.share:.3g} % of the model's"
    rows = [
        ("base model", f"`{base}`, {plan.base_parameters:,} parameters"),
        ("size", size),
        ("ranks", _ranks(plan.rows)),
        ("scale, start", f"`{config.scale}`, `{config.init}`"),
        ("trained whole", ", ".join(whole)),
        ("trained on", trained_on),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows if text)])


def _ranks(rows: list[Any]) -> str:
    """Per kind of layer the number of weights, and the smallest and largest ranks."""
    kinds = Counter(row.layer_type for row in rows)
    texts = []
    for kind, count in kinds.most_common(RANKS_SHOWN):
        ranks = sorted({row.ranks for row in rows if row.layer_type == kind})
        several = f"{sizes(ranks[0])} to {sizes(ranks[-1])}" if len(ranks) > 1 else sizes(ranks[0])
        texts.append(f"{kind} {several} ({count})")
    return ", ".join(texts) + (f" and {len(kinds) - RANKS_SHOWN} kinds more" if len(kinds) > RANKS_SHOWN else "")


def _loading(base: Any, name: str | None, cls: str) -> tuple[str, str]:
    """The imports, and the lines that load base model and adapter."""
    imports, load = "from peft import PeftModel", 'model = PeftModel.from_pretrained(base, ".")'
    if not type(base).__module__.startswith("transformers.") or not name:
        return imports, load
    labels = getattr(getattr(base, "config", None), "num_labels", 2)
    more = f", num_labels={labels}, ignore_mismatched_sizes=True" if "Classification" in cls and labels != 2 else ""
    return f"{imports}\nfrom transformers import {cls}", f'base = {cls}.from_pretrained("{name}"{more})\n{load}'


def _base_name(model: Any) -> str | None:
    """The base model's folder or its name on the hub, if it has one."""
    return getattr(getattr(model.get_base_model(), "config", None), "_name_or_path", None) or None


def _class(model: Any) -> str:
    return type(model.get_base_model()).__name__
