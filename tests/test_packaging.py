"""Wheel and sdist: built from a copy of the repository, and the wheel run from a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel
from packaging.requirements import Requirement

import flora

ROOT = Path(__file__).parents[1]
HEAVY = {"omegaconf", "matplotlib", "timm", "torchvision", "diffusers", "datasets", "accelerate", "lycoris-lora", "ray"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    out, here = tmp_path_factory.mktemp("dist"), os.getcwd()
    os.chdir(ROOT)
    try:
        return {"wheel": out / build_wheel(str(out)), "sdist": out / build_sdist(str(out))}
    finally:
        os.chdir(here)


def test_the_wheel_has_every_file_of_both_packages(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        inside = set(wheel.namelist())
    for package in ("flora", "flora_lab"):
        files = {
            file for file in (ROOT / "src" / package).rglob("*") if file.is_file() and "__pycache__" not in file.parts
        }
        assert {str(file.relative_to(ROOT / "src")) for file in files} <= inside
    assert {name.split("/")[0] for name in inside} == {
        "flora",
        "flora_lab",
        f"flora_peft-{flora.__version__}.dist-info",
    }


def test_the_metadata_are_complete_and_the_dependencies_lean(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        text = wheel.read(f"flora_peft-{flora.__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL")} >= {"Paper"}
    python = {line.rsplit(" ", 1)[1] for line in metadata.get_all("Classifier") if "Python :: 3." in line}
    assert python == {"3.11", "3.12", "3.13"} and metadata.get_payload().startswith("# flora")
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert not {one.name for one in required if one.marker is None} & HEAVY
    train = {one.name for one in required if one.marker and one.marker.evaluate({"extra": "train"})}
    assert not train & {"ray", "diffusers", "bitsandbytes", "torchao", "mkdocs-material", "pytest", "monai"}


def test_the_sdist_is_small_and_builds_the_same_wheel(built, tmp_path):
    assert built["sdist"].stat().st_size < 3 << 20
    with tarfile.open(built["sdist"]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert {"src", "tests", "docs", "configs", "README.md", "LICENSE", "pyproject.toml"} <= {
        p.name for p in folder.iterdir()
    }
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=folder, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again, zipfile.ZipFile(built["wheel"]) as wheel:
        assert {name: again.read(name) for name in again.namelist()} == {n: wheel.read(n) for n in wheel.namelist()}


def test_the_command_runs_from_the_wheel_alone(built, tmp_path):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import flora, sys; from flora.cli import main; assert flora.__file__.startswith(sys.argv[1]), flora.__file__\n"
        "main(['init', 'glue', sys.argv[1] + '/job.yaml'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "flora train" in done.stdout and (tmp_path / "job.yaml").is_file()


def test_the_release_runs_what_a_change_must_pass_on_every_python_that_is_named():
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if "Python :: 3." in line]
    assert all(f'"{version}"' in release for version in named) and ".ci/run" in release
