"""The walls of the design: arrows run one way, and a room never imports what is on its list."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# the rooms of each package, every one after what it may import
ROOMS = {
    "flora": [
        "text",
        "page",
        "keys",
        "fields",
        "tucker",
        "ranks",
        "files",
        "models",
        "layers",
        "tuner",
        "convert",
        "cli",
    ],
    "flora/layers": ["versions", "weights", "batches", "core_space", "starts", "execution", "kinds", "sites"],
    "flora_lab": [
        "errors",
        "sources",
        "lines",
        "tasks",
        "methods",
        "settings",
        "loading",
        "starter",
        "analysis",
        "run",
        "cli",
    ],
}
EXTRAS = ("omegaconf", "matplotlib", "timm", "torchvision", "diffusers", "datasets", "accelerate", "lycoris", "sklearn",
          "scipy", "pycocotools", "ray", "bitsandbytes", "torchao", "hqq", "optimum", "gptqmodel")  # fmt: skip

LAZY = ("timm", "diffusers", "datasets", "lycoris", "sklearn", "ray", "trl", "lm_eval", "lmms_eval")
WITHOUT_TORCH = ("drawing", "figures", "grid", "page", "peft_results", "results", "rows", "tables")

# (files, what they never import, whether that holds inside functions, too)
NEVER = [
    ("flora/**/*.py", ("flora_lab",), True),
    ("flora/**/*.py", EXTRAS, False),
    ("flora/tucker.py", ("torch.nn", "peft", "transformers"), True),
    ("flora/ranks.py", ("torch", "peft", "transformers"), True),
    ("flora/layers/**/*.py", ("peft", "transformers"), True),
    ("flora/tuner/planning/*.py", ("flora.tuner.layer", "flora.tuner.model", "flora.tuner.data_start"), True),
    ("flora_lab/**/*.py", LAZY, False),
    ("flora_lab/tasks/data/*.py", ("flora_lab.tasks.models", "flora_lab.tasks.evaluation"), True),
    ("flora_lab/tasks/models/*.py", ("flora_lab.tasks.evaluation",), True),
    ("flora_lab/analysis/measure.py", ("matplotlib",), True),
    *((f"flora_lab/analysis/{name}.py", ("torch",), True) for name in WITHOUT_TORCH),
]  # fmt: skip


def imported(file: Path, everywhere: bool = True) -> Iterator[str]:
    """Dotted names; without ``everywhere`` only those that importing the file imports."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(package: str, room: str) -> list[Path]:
    folder = SOURCE / package
    return [folder / f"{room}.py"] if (folder / f"{room}.py").is_file() else sorted((folder / room).rglob("*.py"))


@pytest.mark.parametrize(("package", "room"), [(p, room) for p, rooms in ROOMS.items() for room in rooms])
def test_an_arrow_never_runs_back(package, room):
    later = ROOMS[package][ROOMS[package].index(room) + 1 :]
    assert files_of(package, room)
    for file in files_of(package, room):
        rooms = tuple(f"{package.replace('/', '.')}.{other}." for other in later)
        back = {name for name in imported(file) if f"{name}.".startswith(rooms)}
        assert not back, f"{file}: {back}"


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_is_on_the_list(package):
    folder = SOURCE / package
    rooms = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/*.py")}
    assert rooms - {"__init__"} == set(ROOMS[package])


@pytest.mark.parametrize(
    ("files", "packages", "everywhere"), NEVER, ids=[f"{n}-{row[0]}" for n, row in enumerate(NEVER)]
)
def test_a_room_never_imports(files, packages, everywhere):
    assert list(SOURCE.glob(files))
    for file in SOURCE.glob(files):
        names = set(imported(file, everywhere))
        assert not [name for name in names if f"{name}.".startswith(tuple(f"{package}." for package in packages))], file


def test_only_peft_compat_names_what_peft_does_not_export():
    for file in (SOURCE / "flora").rglob("*.py"):
        if file.name != "peft_compat.py":
            assert not [name for name in imported(file) if name.startswith("peft.") and name.count(".") > 1], file


def test_importing_flora_loads_nothing_that_it_does_not_need():
    heavy = [*EXTRAS, "click", "peft", "torch"]
    code = f"import sys, flora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
