"""Files on disk and on the hub: written whole or not at all, and never unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
WEIGHT_FILES = (WEIGHTS, "adapter_model.bin")
PENDING = "adapter_config.pending.json"  # beside an adapter while its files are replaced
ENDINGS = frozenset(".bin .ckpt .csv .json .jsonl .parquet .pt .pth .safetensors .tsv .txt".split())  # of files

# ---------------------------------------------------------------------------------------------- path or name on the hub


def user_path(path: str | os.PathLike) -> Path:
    """The path that a user gave, with ``~`` expanded."""
    return Path(os.path.expanduser(path))


def local_path(source: str | os.PathLike) -> Path | None:
    """The path of a model, an adapter or a data set that a user named; None if it is a name on the hub.

    This is the only rule for path against hub name. What exists here is a path. A ``Path`` is a path, and so is a
    string that starts with ".", "/" or "~", that has more than one slash, whose first part is a folder here, or that
    has no slash and ends as files do (`ENDINGS`). Any other string, NAME or OWNER/NAME, is a name on the hub.

    Raises:
        ValueError: if it is a path and does not exist.
    """
    path, name = user_path(source), os.fspath(source)
    if path.exists():
        return path
    first, slash, _ = name.partition("/")
    must_be_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    must_be_path |= Path(first).is_dir() if slash else path.suffix.lower() in ENDINGS
    if must_be_path or not isinstance(source, str):
        raise ValueError(f"{name}: no such file or folder")
    return None


def from_hub(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download a repository's files that match ``patterns``, and return their folder.

    Raises:
        ValueError: if the hub does not return them.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(hub_failure(name, error)) from error


def hub_failure(name: str, error: Exception) -> str:
    """What to tell a user who may have meant a path: the hub's own error speaks of the hub alone."""
    return f"{name!r} is not a file or folder here, and the hub returned: {' '.join(str(error).split())}"


# -------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` that nothing has. Folders made for it, and what is left of it, go with an error."""
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    # not the process alone: a killed one may have left its files to one with the same number
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # somebody else's file is in it
                break
        raise


@contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces ``path`` at the end, unless an error was raised."""
    with _beside(user_path(path)) as temporary:
        yield temporary


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """As ``replace_file``, for a path that does not exist yet. Raises FileExistsError if it exists."""
    if user_path(path).exists():
        raise FileExistsError(f"{path} exists already; name a new file, or remove it first")
    with replace_file(path) as temporary:
        yield temporary


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder to fill. It becomes ``path`` at the end, unless an error was raised.

    Raises:
        FileExistsError: if ``path`` exists and is not an empty folder.
    """
    path = user_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; name a new folder, or remove it first")
    with _beside(path) as temporary:
        temporary.mkdir()
        yield temporary


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: naming the file, if it cannot be written (a full disk).
    """
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException | None) -> str | None:
    """The line that says so, if it was a full disk or quota that made safetensors, torch or Python fail; else None."""
    while error is not None:
        text = " ".join(str(error).split())
        # torch tells no reason
        torch_failed = isinstance(error, RuntimeError) and ("failed writing file" in text or "iostream error" in text)
        foreign = any(f"os error {number})" in text for number in FULL) or torch_failed
        if (isinstance(error, OSError) and error.errno in FULL) or foreign:
            return f"the disk or quota is full ({text})"
        error = error.__cause__ or error.__context__
    return None


# --------------------------------------------------------------------------------------------- replacing whole adapters


@contextmanager
def replace_adapters(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder for one or more adapters, in which each has a folder. At the end their files replace
    those in ``folder``, unless an error was raised. Other files in ``folder`` stay.

    Whenever the process is killed, ``folder`` holds the old adapter or the new one. The renaming of the weights decides
    which: until then the config is the old one, and afterwards ``finish_replacing`` finds the new one in ``PENDING``.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.save"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".{os.getpid()}-{secrets.token_hex(4)}.save"  # inside: folder may be a file system of its own
    temporary.mkdir()
    try:
        yield temporary
        for config in sorted(temporary.rglob(CONFIG)):
            _replace_adapter(config.parent, folder / config.parent.relative_to(temporary))
        for path in sorted(temporary.iterdir()):  # the model card
            if path.is_file():
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_adapter(new: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = next(new / name for name in WEIGHT_FILES if (new / name).is_file())
    config, old = new / CONFIG, folder / CONFIG
    if old.is_file() and old.read_bytes() != config.read_bytes():
        pending = {"file": weights.name, "sha256": _digest(weights), "config": config.read_text()}
        with replace_file(folder / PENDING) as path:
            path.write_text(json.dumps(pending))
    os.replace(weights, folder / weights.name)
    os.replace(config, old)
    for name in (PENDING, *(name for name in WEIGHT_FILES if name != weights.name)):
        (folder / name).unlink(missing_ok=True)  # PEFT would read the old weights of the other format


def finish_replacing(folder: Path) -> None:
    """Put the config that belongs to the weights in its place, if a process was killed between the two."""
    pending = folder / PENDING
    if not pending.is_file():
        return
    content = read_json(pending)
    weights = folder / str(content.get("file"))
    if weights.name in WEIGHT_FILES and weights.is_file() and _digest(weights) == content.get("sha256"):
        with replace_file(folder / CONFIG) as path:
            path.write_text(str(content.get("config")))
        pending.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


@contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[safe_open]:
    """Open a safetensors file, to read it tensor by tensor.

    Raises:
        ValueError: if the file cannot be opened, or is not a whole safetensors file. Errors of the caller's own block
            pass through.
    """
    try:
        file = safe_open(user_path(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with file:
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if there is no file, or it holds anything else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is needed")
    return content


def saved_shapes(
    source: str | os.PathLike, subfolder: str | None = None, **download: Any
) -> dict[str, tuple[int, ...]] | None:
    """Shapes of an adapter's core spaces, by their tensors' names in the base model. Only the header is read.

    Args:
        source: what ``PeftModel.from_pretrained`` takes: a folder, or else a name on the hub. The file is downloaded to
            the hub's cache, where PEFT finds it again.
        subfolder: the adapter's folder in ``source``.
        download: arguments of ``huggingface_hub.hf_hub_download``: revision, token, cache_dir …

    Returns:
        None if there are no weights: a folder that holds only a config, or a name for which the hub returns no file.

    Raises:
        ValueError: if the weights are not a whole FLoRA adapter.
    """
    path: Path | None = Path(source, subfolder or "", WEIGHTS)
    if not Path(source).is_dir():
        path = _weights_from_hub(os.fspath(source), subfolder, download)
    if path is None or not path.is_file():
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


def _weights_from_hub(name: str, subfolder: str | None, download: dict[str, Any]) -> Path | None:
    """The adapter's weights in the hub's cache. None if the hub returns none: PEFT asks it again and reports that."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, WEIGHTS, subfolder=subfolder, **download))
    except Exception:  # of the hub's and its HTTP client's many classes
        return None
