"""Files on disk: whole or not at all, and never unpickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path; it takes the place of ``path`` at the end, if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded temporary folder; it becomes ``path`` at the end, if nothing went wrong.

    Raises FileExistsError where there is something already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; name a new folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def from_hub(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder with those files of what is on the hub under this name; ValueError where it does not give them."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name!r} is no file and no folder, and the hub does not give it: {reason}") from error


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file, to be read tensor by tensor. Raises ValueError where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is no JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not whole: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is needed")
    return content


def saved_shapes(folder: str | os.PathLike) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the core spaces' tensors in an adapter's folder, by their names in the base model; the header alone is
    read. None for a folder without weights, or a name on the hub: there is nothing to read yet.

    Raises ValueError where the weights are not a whole FLoRA adapter.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return None
    with open_tensors(path) as file:
        keys = list(file.keys())
        dtypes = {key: file.get_slice(key).get_dtype() for key in keys}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    ours = [key for key in keys if ".tucker_space." in key or key.startswith("tucker_space.")]
    if not ours:
        raise ValueError(f"{path} holds no FLoRA weights (its first key: {next(iter(keys), None)!r})")
    for key in ours:
        if not dtypes[key].startswith(("F", "BF")):
            raise ValueError(f"{path}: {key!r} has dtype {dtypes[key]}; a floating-point one is needed")
    return {key.removeprefix("base_model.model."): shapes[key] for key in ours}
