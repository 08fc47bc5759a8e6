"""Run in a process of its own: flora as in an environment that has its dependencies only, without any extra.

Prints as JSON what happened. The environment is made by hiding every other installed distribution from imports.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import sys
import tomllib
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

HEAVY = ("torch", "numpy", "peft", "transformers", "yaml", "omegaconf", "accelerate", "flora.tuner")


def dependencies() -> set[str]:
    """The names of the distributions that `pip install` brings with flora-peft, without extras."""
    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    requirements, extras_of = [Requirement(line) for line in project["dependencies"]], {}
    while requirements:
        requirement = requirements.pop()
        known = extras_of.setdefault(normal(requirement.name), set())
        extras = {"", *requirement.extras} - known
        known |= extras
        for line in metadata.requires(requirement.name) or [] if extras else []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                requirements.append(needed)
    return set(extras_of)


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def hide_the_rest() -> list[str]:
    """Hide the modules of all other distributions; returns their names."""
    needed = {*dependencies(), "flora-peft"}
    owners = metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if needed.isdisjoint(map(normal, names))}

    class Minimal(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            return None if fullname.partition(".")[0] in hidden else super().find_spec(fullname, path, target)

    sys.meta_path[:] = [Minimal if finder is PathFinder else finder for finder in sys.meta_path]
    return sorted(hidden)


def command(*arguments: str) -> dict:
    """What the command prints, its exit code, and the heavy modules that are loaded by then."""
    from flora.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments), prog_name="flora")
        except SystemExit as end:
            code = end.code
    loaded = [name for name in HEAVY if name in sys.modules]
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "loaded": loaded}


def modules() -> dict[str, str]:
    """Each module of flora, and the error that importing it raises, or an empty string."""
    import flora

    errors = {}
    for module in pkgutil.walk_packages(flora.__path__, "flora."):
        try:
            importlib.import_module(module.name)
            errors[module.name] = ""
        except Exception as error:
            errors[module.name] = repr(error)
    return errors


if __name__ == "__main__":
    hidden = hide_the_rest()
    commands = {line: command(*line.split()) for line in ("--help", "--version", "tarin x", "train x")}
    plan = command("plan", sys.argv[1])
    print(json.dumps({"hidden": hidden, "commands": commands, "plan": plan, "modules": modules()}))
