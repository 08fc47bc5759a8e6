"""Pictures: read from a folder, parquet files or the hub, and opened. How a model sees them is up to the task."""

from __future__ import annotations

import glob
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.files import local_path
from flora_lab.tasks.data.records import SPLITS, Portions, Records, split_name

DIGITS = "digits"


@dataclass
class Pictures(Portions):
    """Portions of a source of pictures, and the normalisation of their channels, by default ImageNet's."""

    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406], metadata={"help": "per channel"})
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225], metadata={"help": "per channel"})

    def __post_init__(self):
        super().__post_init__()
        finite = all(map(math.isfinite, [*self.mean, *self.std]))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not finite or min(self.std) <= 0:
            raise ValueError(
                f"task.data.mean={self.mean} and task.data.std={self.std}: expected one or three numbers each, "
                "the latter above 0"
            )


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str, images: Iterable[str] = ()) -> dict[str, Records]:
    """Splits by name, from a parquet file, a folder of parquet files or pictures, the hub, or scikit-learn's `DIGITS`.

    ``images``: the columns of pictures, which stay encoded: {"bytes", "path"}. Raises ValueError naming ``path``.
    """
    import datasets

    datasets.disable_progress_bars()
    place = None if path == DIGITS else local_path(path)
    try:
        if path == DIGITS:
            splits = _digits()
        elif place is None:
            splits = {name: Records(split, _namer(path, name)) for name, split in datasets.load_dataset(path).items()}
        else:
            files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
            splits = _parquet(files) if files else _folder(place)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of pyarrow's, the hub's and datasets' many classes
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    for records in splits.values():
        for column in set(images) & set(records.dataset.column_names):
            if not isinstance(records.dataset.features[column], datasets.Image):
                raise ValueError(f"{path}: column {column!r} holds {records.dataset.features[column]}, not images")
            records.dataset = records.dataset.cast_column(column, datasets.Image(decode=False))
    named: dict[str, str] = {}
    for name in splits:
        if (other := named.setdefault(split_name(name), name)) != name:
            raise ValueError(f"{path}: both {other} and {name} are a {split_name(name)} split")
    return {split: splits[name] for split, name in named.items()}


def _parquet(files: list[Path]) -> dict[str, Records]:
    """From files such as SPLIT-00000-of-00001.parquet, or SPLIT/0000.parquet as on the hub; a single file is train."""
    import datasets

    names: dict[str, list[Path]] = {}
    for file in files:
        name = file.absolute().parent.name if file.stem.isdigit() else re.split(r"[-_.]", file.stem)[0]
        names.setdefault(name if len(files) > 1 else "train", []).append(file)
    splits = {}
    for name, some in names.items():
        parts = [_one_parquet(file) for file in some]
        places = [f"{file}, row {row}" for file, part in zip(some, parts, strict=True) for row in range(len(part))]
        splits[name] = Records(datasets.concatenate_datasets(parts), places.__getitem__)
    return splits


def _one_parquet(file: Path) -> Any:
    import datasets
    from pyarrow.parquet import ParquetFile

    try:
        if ParquetFile(file).metadata.num_rows:
            return datasets.Dataset.from_parquet(glob.escape(str(file)))
    except Exception as error:
        raise ValueError(f"{file.name}: {error}") from error
    raise ValueError(f"{file.name} is empty")


def _folder(folder: Path) -> dict[str, Records]:
    """From pictures SPLIT/CLASS/NAME, or CLASS/NAME, which are all train; sorted by path, without hidden files.

    The class is the folder's name. A picture at any other depth raises ValueError.
    """
    import datasets
    from PIL import Image

    endings = Image.registered_extensions()
    names = sorted(name.name for name in folder.iterdir() if name.is_dir() and split_name(name.name) in SPLITS)
    pictures: dict[str, list[Path]] = {name: [] for name in names or ["train"]}
    for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True)):
        file, (*folders, _) = folder / name, Path(name).parts
        if file.suffix.lower() not in endings or file.is_dir():
            continue
        split = folders.pop(0) if names and folders else "train"
        if split not in pictures or len(folders) != 1:
            depth = f"SPLIT/CLASS/NAME, with SPLIT one of {', '.join(names)}" if names else "CLASS/NAME"
            raise ValueError(f"{name} is not where a picture is expected, {depth}")
        pictures[split].append(file)
    classes = sorted({file.parent.name for files in pictures.values() for file in files})
    if not classes:
        raise ValueError("no pictures and no parquet files in it")
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=classes))
    splits = {}
    for split, files in pictures.items():
        paths = [str(file) for file in files]
        columns = {"image": paths, "label": [file.parent.name for file in files]}
        splits[split] = Records(datasets.Dataset.from_dict(columns, features=features), paths.__getitem__)
    return splits


def _digits() -> dict[str, Records]:
    """scikit-learn's 1797 handwritten digits of 8 × 8 pixels, as one split."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).round().astype("uint8")) for image in digits.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    rows = datasets.Dataset.from_dict({"image": pictures, "label": digits.target.tolist()}, features=features)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    return {"train": Records(rows, lambda index: f"{DIGITS}, row {index}")}


def of_files(files: Sequence[str], names: Sequence[str], places: Sequence[int]) -> Records:
    """Records of picture files, with the column "place" for what else belongs to them."""
    import datasets

    features = datasets.Features({"image": datasets.Image(decode=False), "place": datasets.Value("int64")})
    columns = {"image": list(files), "place": list(places)}
    return Records(datasets.Dataset.from_dict(columns, features=features), names.__getitem__)


def _namer(path: str, split: str) -> Callable[[int], str]:
    return lambda index: f"{path}, {split}, row {index}"


# ---------------------------------------------------------------------------------------------------------- opening


def open_image(records: Records, index: int, column: str, channels: int | None = None) -> Any:
    """A record's picture, decoded by Pillow; with ``channels``, converted to one or three channels of 8 bits.

    Raises ValueError naming the record and its file, if it has one.
    """
    return opened(records.dataset[index][column], records.name(index), column, channels)


def opened(cell: dict[str, Any] | None, name: str, column: str, channels: int | None = None) -> Any:
    """The picture of a cell {"bytes", "path"}, as `open_image`; ``name``: the record's."""
    from PIL import Image, UnidentifiedImageError

    encoded, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    try:
        if encoded is None and not (path and Path(path).is_file()):
            raise ValueError("missing")
        picture = Image.open(io.BytesIO(Path(path).read_bytes() if encoded is None else encoded))
        picture.load()
        return picture if channels is None else _bytes(picture).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = f" ({path})" if path and path not in name else ""
        what = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name}{where}: column {column!r} is not a readable image: {what}") from error


def _bytes(picture: Any) -> Any:
    """Grey values of 16 bits, scaled to 8: Pillow would clip them at 255. Raises ValueError if the range is unknown."""
    import numpy as np
    from PIL import Image

    # Pillow opens PGMs of 16 bits as mode I, and before version 11 PNGs too
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray(np.rint(np.asarray(picture) / 257).astype("uint8"))
    if picture.mode in ("I", "F"):
        raise ValueError(f"of mode {picture.mode}, whose range is unknown; expected 8 or 16 bits per channel")
    return picture
