"""Tensors on disk in any layout, read one at a time: no model has to be in memory."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from flora.files import WEIGHTS, from_hub, local_path, open_tensors, read_json
from flora.models import hub_name

# names of the weights, without the suffix, of transformers, diffusers, and older transformers
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# files of an adapter or a training run, which may lie beside a model's weights
NO_WEIGHTS = (".*", WEIGHTS, "adapter_model.bin", "training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")
NESTED = ("state_dict", "model")
PIPELINE = "model_index.json"
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
# safetensors' names of dtypes; torch 2.6 lacks the last one
DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items() if hasattr(torch, dtype)}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor in a safetensors file, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one model, by key.

    Args:
        source: the user's name for it, for messages.
        folder: where it lies; None for a single file.
        files: the file of every key, in the files' order.
        metadata: of its safetensors files.
    """

    source: str
    folder: Path | None
    files: dict[str, Path]
    metadata: dict[str, str] = field(default_factory=dict)
    # headers of a safetensors file; of a torch file the tensors themselves, which are mapped and read on access
    _entries: dict[str, Header | Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open a model's weights. Only headers are read.

        Args:
            source: a folder as transformers or diffusers write it, one file (.safetensors, or .bin, .pt, .pth, from
                which no code is unpickled), or a name on the hub.
            revision: on the hub.

        Raises:
            ValueError: if there are no weights, a file is corrupt or holds anything but tensors, or the hub does not
                return the model.
        """
        path = local_path(source)
        if path is not None and path.is_file():
            return cls._read(str(source), None, [path], {})
        folder = path or _model_from_hub(hub_name(str(source)), revision)
        paths, index = _weight_files(folder)
        return cls._read(str(source), folder, paths, index)

    @classmethod
    def _read(cls, source: str, folder: Path | None, paths: list[Path], index: dict[str, Path]) -> Self:
        files: dict[str, Path] = {}
        metadata: dict[str, str] = {}
        entries: dict[str, Header | Tensor] = {}
        for path in paths:
            for key, entry in _entries(path, metadata):
                if key in entries:
                    raise ValueError(f"{source}: {key!r} is in {files[key].name} and in {path.name}; keep one of them")
                files[key], entries[key] = path, entry
        for key, path in index.items():
            if files.get(key) != path:
                raise ValueError(f"{path}: {key!r} is missing, although the index lists it")
        if not files:
            raise ValueError(f"{paths[0]} holds no tensors")
        return cls(source, folder, files, metadata, entries)

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self.files)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor, from the header."""
        return tuple(self._entry(key).shape)

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor, from the header."""
        return self._entry(key).dtype

    def tensor(self, key: str) -> Tensor:
        """Read a tensor. It is the caller's own."""
        entry = self._entry(key)
        if isinstance(entry, Tensor):
            return entry.clone(memory_format=torch.contiguous_format)
        with open_tensors(self.files[key]) as file:
            return file.get_tensor(key)

    def _entry(self, key: str) -> Header | Tensor:
        if key not in self._entries:
            raise ValueError(f"{self.source} has no weight {key!r}; {self.nearest(key)}")
        return self._entries[key]

    def nearest(self, key: str) -> str:
        """The end of a message about a missing key: the nearest keys that exist."""
        return f"the nearest: {', '.join(difflib.get_close_matches(key, self.files, n=3, cutoff=0.0))}"


# ---------------------------------------------------------------------------------------------------------- which files


def _model_from_hub(name: str, revision: str | None) -> Path:
    folder = from_hub(name, BESIDE_WEIGHTS, revision)
    if not (folder / PIPELINE).is_file():  # of a pipeline this would download the weights of all components
        folder = from_hub(name, [*BESIDE_WEIGHTS, "*.safetensors"], revision)
        if not any(folder.glob("*.safetensors")):
            folder = from_hub(name, [*BESIDE_WEIGHTS, "*.bin"], revision)
    return folder


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files with the model's weights, and the file of each key if there is an index, else {}."""
    files = {path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in NO_WEIGHTS)}
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        weights = sorted(name for name in files if name.endswith(suffixes))
        plain = [stem + suffix for stem in STEMS for suffix in suffixes if stem + suffix in weights]
        indices = sorted(name for name in files if name.endswith(tuple(f"{s}.index.json" for s in suffixes)))
        if plain:
            return [folder / plain[0]], {}
        if len(indices) > 1:
            raise ValueError(f"{folder} has several indices: {', '.join(indices)}; give a folder with one model")
        if indices:
            return _indexed(folder / indices[0])
        if weights:
            return [folder / name for name in weights], {}
    raise ValueError(f"{folder} has no weights of a model{_other_contents(folder)}")


def _other_contents(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return ": it is an adapter's folder"
    if (folder / PIPELINE).is_file():
        return ": it is a pipeline's folder; give the folder of one component, such as unet"
    return ""


def _indexed(path: Path) -> tuple[list[Path], dict[str, Path]]:
    try:
        index = {key: path.parent / name for key, name in read_json(path)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of a sharded checkpoint: {error!r}") from error
    paths = sorted(set(index.values()))
    if missing := [shard.name for shard in paths if not shard.is_file()]:
        raise ValueError(f"{path} names files that are missing: {', '.join(missing)}")
    return paths, index


# ------------------------------------------------------------------------------------------------------- their contents


def _entries(path: Path, metadata: dict[str, str]) -> Iterator[tuple[str, Header | Tensor]]:
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            metadata |= file.metadata() or {}
            for key in file.keys():
                header = file.get_slice(key)
                dtype = header.get_dtype()
                if dtype not in DTYPES:
                    raise ValueError(f"{path}: {key!r} has dtype {dtype}; one of {', '.join(DTYPES)} is needed")
                yield key, Header(tuple(header.get_shape()), DTYPES[dtype])
    elif path.suffix in TORCH_SUFFIXES:
        yield from _unnested(path, _load(path)).items()
    else:
        raise ValueError(f"{path} is not a checkpoint; .safetensors, {', '.join(TORCH_SUFFIXES)} can be read")


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # a file from before torch 1.6, which cannot be mapped
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors; it is not read, since it could run code") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole torch file: {error}") from error


def _unnested(path: Path, content: Any) -> dict[str, Tensor]:
    """The dict of tensors, without the dicts that training programs put around it."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in NESTED if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dict of tensors is needed")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}; a dict of tensors is needed")
    return dict(content)
