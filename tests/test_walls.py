"""The walls of the design: who may import whom, and what a plain import must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flora

ROOT = Path(flora.__file__).parent
ORDER = [
    "tucker", "ranks", "core_space", "execution", "stand_in", "kinds", "files", "peft_compat", "config", "targets",
    "plan", "layer", "tuner", "gradient", "hotswap", "__init__", "models", "convert", "baselines", "methods", "tasks",
    "settings", "analysis", "train", "trial", "job", "compare", "cli",
]  # fmt: skip
HEAVY = (
    "timm", "torchvision", "diffusers", "datasets", "lycoris", "matplotlib", "sklearn", "scipy", "pycocotools", "ray",
)  # fmt: skip


def imports(room: str, everywhere: bool = True) -> set[str]:
    """Dotted names imported by a room; without ``everywhere`` only at the top of its files."""
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).glob("*.py"))
    names = set()
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if everywhere else tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_used(room: str) -> set[str]:
    parts = [name.split(".") for name in imports(room) if name.startswith("flora")]
    used = {part[1] if len(part) > 1 and part[1] in ORDER else "__init__" for part in parts}
    if any(len(part) > 1 and part[1] in ORDER for part in parts):
        used -= {"__init__"} if not any(len(p) == 2 and p[1] not in ORDER for p in parts) else set()
    return used - {room}


def uses(room: str, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(room))


def test_every_room_is_in_the_order():
    rooms = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_an_arrow_never_runs_back(room):
    later = set(ORDER[ORDER.index(room) :])
    if room != "__init__":
        assert not rooms_used(room) & later


@pytest.mark.parametrize("room", ["tucker", "ranks", "core_space", "execution", "stand_in", "kinds"])
def test_the_mathematics_does_not_know_peft(room):
    assert not uses(room, "peft") and not uses(room, "transformers")
    if room in ("tucker", "ranks"):
        assert "torch.nn" not in imports(room)


def test_the_layer_gets_plain_values():
    assert not uses("layer", "flora.config") and not uses("layer", "flora.tuner")


@pytest.mark.parametrize("room", ORDER)
def test_heavy_packages_load_inside_functions(room):
    assert not [name for name in imports(room, everywhere=False) if name.split(".")[0] in HEAVY]


def test_plain_import_loads_nothing_heavy():
    # beyond what PEFT and transformers load by themselves where it is installed
    loaded = f"[m for m in {HEAVY!r} if m in set(sys.modules) - before]"
    code = f"import sys, peft; before = set(sys.modules); import flora; print({loaded})"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
