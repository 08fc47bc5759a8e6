"""Pictures: read from a folder, parquet files or the hub, and opened. How a model sees them is up to the task."""

from __future__ import annotations

import glob
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.files import hub_failure, local_path
from flora_lab.tasks.data.records import SPLITS, Portions, Records, split_name

DIGITS = "digits"
UNREAD = frozenset(  # endings of pictures that Pillow does not open; AVIF it does since version 11.3
    ".3fr .arw .avif .cr2 .cr3 .crw .dcm .dcr .dng .erf .exr .heic .heif .hif .iiq .jxl .kdc .mef .mrw .nef .nrw .orf "
    ".pef .raf .raw .rw2 .rwl .sr2 .srf .srw .svg .x3f".split()
)
REMEDY = "save it as JPEG or PNG"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


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
        text = f"{path}: {' '.join(str(error).split())}" if path == DIGITS or place else hub_failure(path, error)
        raise ValueError(text) from error
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

    names = sorted(name.name for name in folder.iterdir() if name.is_dir() and split_name(name.name) in SPLITS)
    pictures: dict[str, list[Path]] = {name: [] for name in names or ["train"]}
    for file in picture_files(folder):
        name = file.relative_to(folder)
        *folders, _ = name.parts
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


def picture_files(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The pictures in a folder, sorted by path, without hidden files.

    Raises ValueError if there are pictures of a kind that Pillow does not open: nobody would miss them.
    """
    from PIL import Image

    endings = Image.registered_extensions()
    files = (folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True)))
    files = [file for file in files if _ending(file) in endings.keys() | UNREAD and not file.is_dir()]
    if unread := [file for file in files if _ending(file) not in endings]:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        kinds = ", ".join(sorted(set(map(_ending, unread))))
        raise ValueError(f"{unread[0]}{more}: {kinds} is not read; {REMEDY}, or move it away")
    return files


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
    """A record's picture, decoded by Pillow and turned upright, as its EXIF orientation says; with ``channels``,
    converted to one or three channels of 8 bits.

    Raises ValueError naming the record and its file, if it has one.
    """
    return opened(records.dataset[index][column], records.name(index), column, channels)


def opened(cell: Any, name: str, column: str, channels: int | None = None) -> Any:
    """The picture of a cell, {"bytes", "path"} or Pillow's own, as `open_image`; ``name``: the record's."""
    from PIL import ImageOps

    path = cell.get("path") if isinstance(cell, dict) else None
    where = f" ({path})" if path and path not in name else ""
    with _naming(f"{name}{where}: column {column!r} is not a readable image", path):
        picture = _decoded(cell)
        with suppress(Exception):  # EXIF can be broken in many ways; in place, what has been turned stays so
            ImageOps.exif_transpose(picture, in_place=True)
        return picture if channels is None else _bytes(picture).convert("L" if channels == 1 else "RGB")


def size_of(file: str) -> tuple[int, int]:
    """Width and height of a picture as it is opened, from its header alone. Raises ValueError naming the file."""
    from PIL.ExifTags import Base as Tags
    from PIL.Image import Image, open

    with _naming(f"{file}: not a readable image", file), open(file) as picture:
        width, height = picture.size
        if picture.format == "TIFF":  # whether the size is turned already depends on Pillow's version
            width, height = picture.tag_v2[Tags.ImageWidth], picture.tag_v2[Tags.ImageLength]
        orientation = None
        with suppress(Exception):
            orientation = Image.getexif(picture).get(Tags.Orientation)  # PNG's own method decodes the picture
        return (height, width) if orientation in SIDEWAYS else (width, height)


def _decoded(cell: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(cell, Image.Image):
        return cell
    encoded, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if encoded is None and not (path and Path(path).is_file()):
        raise ValueError("missing")
    picture = Image.open(io.BytesIO(Path(path).read_bytes() if encoded is None else encoded))
    if picture.format == "TIFF" and _ending(path) in UNREAD:  # a camera's: Pillow opens the small preview in it
        raise UnidentifiedImageError
    picture.load()
    return picture


@contextmanager
def _naming(problem: str, path: str | None) -> Iterator[None]:
    """Raise ValueError, beginning with ``problem``, for all that Pillow raises."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        what = f"{_ending(path)} is not read; {REMEDY}" if _ending(path) in UNREAD else "not a picture"
        raise ValueError(f"{problem}: {what}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{problem}: {error}") from error


def _ending(path: str | Path | None) -> str:
    return Path(path or "").suffix.lower()


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
