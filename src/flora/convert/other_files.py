"""The files of a model's folder that are not its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# weights in any format, which would still be the base's
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite", ".npz"),
}
# hidden files, the weights' index, and files of an adapter or a training run
NOT_COPIED = (".*", "*.index.json", "*.index.*.json", "adapter_config.json", "trainer_state.json")


def copy_other_files(base: Path, folder: Path) -> None:
    """Copy config, tokenizer, processor and code from ``base`` to ``folder``. Files that are there already stay.

    Subfolders with weights are copied only if they are further modules of a sentence-transformers model: others hold
    copies of the base, or checkpoints.

    Raises:
        ValueError: if ``modules.json`` is corrupt.
    """
    modules = _module_folders(base)
    for path in sorted(base.iterdir()):
        if any(path.match(pattern) for pattern in NOT_COPIED) or (path.is_file() and _is_weights(path)):
            continue
        if path.is_file():
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        elif path.name in modules or not any(map(_is_weights, path.rglob("*"))):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(".*"))


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES


def _module_folders(base: Path) -> set[str]:
    path = base / "modules.json"
    try:
        return {module["path"] for module in json.loads(path.read_text())} if path.is_file() else set()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by sentence-transformers, or is corrupt: {error!r}") from error
