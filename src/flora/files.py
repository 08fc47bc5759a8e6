"""Files on disk: whole or not at all, and never unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path; it takes the place of ``path`` at the end, and only if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_adapter_file(folder: str | os.PathLike) -> None:
    """Raise ValueError where ``folder`` holds adapter weights that are not a whole FLoRA adapter.

    A folder without weights, or a name on the hub, passes: there is nothing to read yet.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            dtypes = {key: file.get_slice(key).get_dtype() for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    ours = [key for key in keys if ".tucker_space." in key or key.startswith("tucker_space.")]
    if not ours:
        raise ValueError(f"{path} holds no FLoRA weights (its first key: {next(iter(keys), None)!r})")
    for key in ours:
        if not dtypes[key].startswith(("F", "BF")):
            raise ValueError(f"{path}: {key!r} has dtype {dtypes[key]}; a floating-point one is needed")
