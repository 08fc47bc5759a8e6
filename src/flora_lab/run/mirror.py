"""A copy of a job's folder on storage that other machines reach: s3://, gs://, any file system of fsspec.

Each machine works in a folder of its own. It takes what it needs from the mirror, and brings what it has finished: a
row, a complete checkpoint, a trained adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

import fsspec
from transformers import TrainerCallback

from flora.files import replace_file
from flora_lab.errors import ConfigError
from flora_lab.loading import one_line
from flora_lab.run.fit import Checkpoints
from flora_lab.settings import Config

BASES = "bases"  # where shared files are
SMALL = 2**20  # bytes; larger files never change under the same name and size


class Mirror:
    """The mirror of a folder, if there is one. Raises ConfigError if the storage can't be reached."""

    def __init__(self, config: Config) -> None:
        self.url, self.output = config.mirror, Path(config.output)
        if not self.url:
            return
        try:
            self.files, self.root = fsspec.url_to_fs(self.url)
            self.files.makedirs(self.root, exist_ok=True)
        except Exception as error:  # fsspec's file systems raise what they like
            raise ConfigError(f"mirror={self.url}: {one_line(error)}") from error

    def pull(self, folder: Path, names: Iterable[str] = ()) -> None:
        """Bring the files of ``folder``, or some of them, here. A longer file here is newer, and stays."""
        if not self.url:
            return
        for place, size in self._there(folder, names).items():
            local = self.output / place
            if not local.exists() or local.stat().st_size < size:
                with replace_file(local) as part:
                    self.files.get_file(self._path(place), str(part))

    def push(self, folder: Path, names: Iterable[str] = ()) -> None:
        """Make ``folder``, or some of its files, the same there as here."""
        if not self.url:
            return
        there, here = self._there(folder, names), self._here(folder, names)
        for place in sorted(here, key=lambda place: place.endswith(Checkpoints.MARK)):  # the mark says: complete
            size = (self.output / place).stat().st_size
            if there.get(place) != size or size < SMALL:
                self.files.makedirs(self._path(place).rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(self.output / place), self._path(place))
        gone = sorted(there.keys() - here, key=lambda place: not place.endswith(Checkpoints.MARK))
        for place in gone:
            self.files.rm_file(self._path(place))
        self._drop_empty({parent for place in gone for parent in PurePosixPath(place).parents})

    def share(self, file: Path) -> None:
        """Bring a file from outside the folder, such as the base model's weights, there, unless it is."""
        if self.url and not self.files.exists(self._path(f"{BASES}/{file.name}")):
            self.files.makedirs(self._path(BASES), exist_ok=True)
            self.files.put_file(str(file), self._path(f"{BASES}/{file.name}.part"))
            self.files.mv(self._path(f"{BASES}/{file.name}.part"), self._path(f"{BASES}/{file.name}"))

    def fetch(self, file: Path) -> None:
        """Bring a file that another machine has shared here, if it is missing."""
        if self.url and not file.exists() and self.files.exists(self._path(f"{BASES}/{file.name}")):
            with replace_file(file) as part:
                self.files.get_file(self._path(f"{BASES}/{file.name}"), str(part))

    def clear(self, names: Iterable[str]) -> None:
        """Delete these files and folders there, and nothing else: the storage may hold more than this job."""
        if not self.url:
            return
        self.files.invalidate_cache()
        for path in map(self._path, names):
            if self.files.exists(path):
                self.files.rm(path, recursive=True)

    def _drop_empty(self, folders: Iterable[PurePosixPath]) -> None:
        """Delete those of the folders that are empty there and missing here: object stores, unlike disks, have none."""
        self.files.invalidate_cache()
        for folder in sorted(folders, reverse=True):  # the inner before the outer
            path = self._path(str(folder))
            # not left to rmdir, which deletes full folders, too, on some storage
            if not (self.output / folder).exists() and self.files.isdir(path) and not self.files.ls(path):
                with suppress(OSError):  # another machine may just have filled it
                    self.files.rmdir(path)

    def _path(self, place: str) -> str:
        return f"{self.root}/{place}"

    def _here(self, folder: Path, names: Iterable[str]) -> set[str]:
        paths = [folder / name for name in names] or list(folder.rglob("*"))
        return {path.relative_to(self.output).as_posix() for path in paths if path.is_file()}

    def _there(self, folder: Path, names: Iterable[str]) -> dict[str, int]:
        """The sizes of the files there, by their place in the output."""
        below = self._path(folder.relative_to(self.output).as_posix()).removesuffix("/.")
        self.files.invalidate_cache()
        if not self.files.exists(below):
            return {}
        sizes = {name: about["size"] for name, about in self.files.find(below, detail=True).items()}
        places = {os.path.relpath(name, self.root): size for name, size in sizes.items()}
        wanted = {(folder / name).relative_to(self.output).as_posix() for name in names}
        return {place: size for place, size in places.items() if not wanted or place in wanted}


class PushCheckpoints(TrainerCallback):
    """Brings every complete checkpoint to the mirror; the main process does."""

    def __init__(self, mirror: Mirror, folder: Path) -> None:
        self.mirror, self.folder = mirror, folder

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.mirror.push(self.folder)
