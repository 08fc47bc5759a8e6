"""Pictures: where they come from (a folder, parquet files, the hub), and how one is opened. What is true of examples of
any kind is in `data`; how a picture is shown to a model, in its task."""

from __future__ import annotations

import glob
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora_lab.tasks.data import SPLITS, Portions, Table, is_place, split_name


@dataclass
class Pictures(Portions):
    """Portions of a source of pictures, and how their channels are normalised: ImageNet's by default."""

    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406], metadata={"help": "of each channel"})
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225], metadata={"help": "of each channel"})

    def __post_init__(self):
        super().__post_init__()
        finite = all(map(math.isfinite, [*self.mean, *self.std]))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not finite or min(self.std) <= 0:
            raise ValueError(
                f"task.data.mean={self.mean} and task.data.std={self.std}: expected one or three numbers each, "
                "the latter above 0"
            )


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str, images: Iterable[str] = ()) -> dict[str, Table]:
    """Splits by name: of a parquet file, a folder of such, a folder of images, or the hub.

    ``images`` are the columns of pictures: left encoded, as {"bytes", "path"}. Raises ValueError naming ``path``.
    """
    import datasets

    datasets.disable_progress_bars()
    place = Path(path)
    try:
        if files := sorted(place.rglob("*.parquet")) if place.is_dir() else [place] * (place.suffix == ".parquet"):
            tables = _parquet(files)
        elif place.is_dir():
            tables = _folder(place)
        elif is_place(path):
            raise ValueError("no such file or folder")
        else:
            tables = {name: Table(rows, _namer(path, name)) for name, rows in datasets.load_dataset(path).items()}
    except Exception as error:  # of pyarrow's, the hub's and datasets' many classes
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    for table in tables.values():
        for column in set(images) & set(table.rows.column_names):
            if not isinstance(table.rows.features[column], datasets.Image):
                raise ValueError(f"{path}: column {column!r} holds {table.rows.features[column]}, no images")
            table.rows = table.rows.cast_column(column, datasets.Image(decode=False))
    named: dict[str, str] = {}
    for name in tables:
        if (other := named.setdefault(split_name(name), name)) != name:
            raise ValueError(f"{path}: both {other} and {name} are a {split_name(name)} split")
    return {split: tables[name] for split, name in named.items()}


def _parquet(files: list[Path]) -> dict[str, Table]:
    """Of SPLIT-00000-of-00001.parquet and its like, or of the hub's own SPLIT/0000.parquet; one file alone is train."""
    import datasets

    names: dict[str, list[Path]] = {}
    for file in files:
        name = file.absolute().parent.name if file.stem.isdigit() else re.split(r"[-_.]", file.stem)[0]
        names.setdefault(name if len(files) > 1 else "train", []).append(file)
    tables = {}
    for name, some in names.items():
        parts = [_one_parquet(file) for file in some]
        places = [f"{file}, row {row}" for file, part in zip(some, parts, strict=True) for row in range(len(part))]
        tables[name] = Table(datasets.concatenate_datasets(parts), places.__getitem__)
    return tables


def _one_parquet(file: Path) -> Any:
    import datasets
    from pyarrow.parquet import ParquetFile

    try:
        if ParquetFile(file).metadata.num_rows:
            return datasets.Dataset.from_parquet(glob.escape(str(file)))
    except Exception as error:
        raise ValueError(f"{file.name}: {error}") from error
    raise ValueError(f"{file.name} is empty")


def _folder(folder: Path) -> dict[str, Table]:
    """Of pictures SPLIT/CLASS/NAME, or CLASS/NAME, which are all train; sorted by path, hidden ones left out.

    Nothing is told by a picture's own name, and none is passed over: one at another depth raises ValueError.
    """
    import datasets
    from PIL import Image

    endings = Image.registered_extensions()
    splits = sorted(name.name for name in folder.iterdir() if name.is_dir() and split_name(name.name) in SPLITS)
    found: dict[str, list[Path]] = {name: [] for name in splits or ["train"]}
    for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True)):
        file, (*folders, _) = folder / name, Path(name).parts
        if file.suffix.lower() not in endings or file.is_dir():
            continue
        split = folders.pop(0) if splits and folders else "train"
        if split not in found or len(folders) != 1:
            depth = f"SPLIT/CLASS/NAME, with SPLIT one of {', '.join(splits)}" if splits else "CLASS/NAME"
            raise ValueError(f"{name} is not where a picture is expected, {depth}")
        found[split].append(file)
    classes = sorted({file.parent.name for files in found.values() for file in files})
    if not classes:
        raise ValueError("neither pictures in it nor parquet files")
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=classes))
    tables = {}
    for split, files in found.items():
        paths = [str(file) for file in files]
        columns = {"image": paths, "label": [file.parent.name for file in files]}
        tables[split] = Table(datasets.Dataset.from_dict(columns, features=features), paths.__getitem__)
    return tables


def _namer(path: str, split: str) -> Callable[[int], str]:
    return lambda index: f"{path}, {split}, row {index}"


# ---------------------------------------------------------------------------------------------------------- opening


def open_image(table: Table, index: int, column: str, channels: int | None = None) -> Any:
    """The picture of a row, decoded by Pillow, as it is or in one or three ``channels`` of 8 bits.

    Raises ValueError naming the row and, if it has one, its file.
    """
    from PIL import Image, UnidentifiedImageError

    found, name = table.rows[index][column] or {}, table.name(index)
    encoded, path = found.get("bytes"), found.get("path")
    try:
        if encoded is None and not (path and Path(path).is_file()):
            raise ValueError("missing")
        picture = Image.open(io.BytesIO(Path(path).read_bytes() if encoded is None else encoded))
        picture.load()
        return picture if channels is None else _bytes(picture).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = f" ({path})" if path and path not in name else ""
        what = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name}{where}: column {column!r} is no readable image: {what}") from error


def _bytes(picture: Any) -> Any:
    """Greys of 16 bits scaled to 8, which Pillow would cut off at 255. Raises ValueError where the range is unknown."""
    import numpy as np
    from PIL import Image

    # Pillow before 11 opens PNGs of 16 bits as I, and all versions such PGMs
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray(np.rint(np.asarray(picture) / 257).astype("uint8"))
    if picture.mode in ("I", "F"):
        raise ValueError(f"of mode {picture.mode}, whose range is unknown; expected 8 or 16 bits a channel")
    return picture
