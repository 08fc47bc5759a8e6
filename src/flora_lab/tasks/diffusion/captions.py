"""Pictures with captions: read from a folder, parquet files or the hub, and shown to a diffusion model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flora.files import local_path
from flora_lab.tasks.data.pictures import DIGITS, open_image, picture_files, read
from flora_lab.tasks.data.records import SPLITS, Portions, Records, check_each, need_columns, split_name, three
from flora_lab.tasks.data.rows import rows_of
from flora_lab.tasks.data.texts import read_text

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as datasets' ImageFolder reads them
IMAGE, CAPTION = "image", "caption"  # the columns of all records that `read_captions` returns
LABEL = "label"  # the column of the folders' names, which are the captions then


@dataclass
class Captions(Portions):
    """Where the pictures and their captions come from, and how they are transformed."""

    few: ClassVar[str] = ", or set task.data.reuse=true, which takes all pictures for each split"

    path: str = field(
        default="data",
        metadata={
            "help": f"a folder of pictures with {METADATA[0]} (or .csv) or a .txt beside each, a parquet file, a name "
            f"on the hub, or {DIGITS} (scikit-learn's, with caption={LABEL})",
            "path": True,
        },
    )
    image: str = field(default="image", metadata={"help": "column of the pictures"})
    caption: str = field(
        default="text", metadata={"help": f"column of the captions; {LABEL}: the names of classes, or of folders"}
    )
    prompt: str | None = field(default=None, metadata={"help": "one caption for all pictures, as for DreamBooth"})
    only: list[str] = field(default_factory=list, metadata={"help": "use pictures with these captions alone"})
    reuse: bool = field(
        default=False, metadata={"help": "learn from all pictures, and validate and test on the same: for a handful"}
    )
    size: int = field(default=512, metadata={"help": "pixels: scale the shorter side to it, and crop", "least": 8})
    random_crop: bool = field(default=False, metadata={"help": "crop train's pictures anywhere, not in the middle"})
    mirror: bool = field(default=False, metadata={"help": "mirror half of train's pictures"})
    drop: float = field(
        default=0.0, metadata={"help": "share of train's captions left empty, for guidance", "least": 0, "most": 1}
    )
    prior: str | None = field(
        default=None, metadata={"help": "folder of pictures of the class, which keep it as it was", "path": True}
    )
    prior_prompt: str | None = field(default=None, metadata={"help": "their caption"})
    prior_weight: float = field(default=1.0, metadata={"help": "of their loss", "above": 0})

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompt", "prior_prompt"):
            given = getattr(self, name)
            if given is not None and not given.strip():
                raise ValueError(f"task.data.{name} is empty: expected a caption")
        if (self.prior is None) != (self.prior_prompt is None):
            raise ValueError(
                f"task.data.prior={self.prior} and task.data.prior_prompt={self.prior_prompt}: expected both or neither"
            )


# ------------------------------------------------------------------------------------------------------------- reading


def read_captions(keys: Captions, needed: bool = True) -> tuple[dict[str, Records], list[str]]:
    """Splits by name, with the columns `IMAGE` and `CAPTION`; and all captions, in the order of the source's classes if
    it has some, else sorted. Without ``needed`` a caption may be missing.

    Raises ValueError naming the file, and its row if it has rows.
    """
    place = None if keys.path == DIGITS else local_path(keys.path)
    is_folder = place and place.is_dir() and keys.caption != LABEL
    if is_folder and all(file.name in METADATA for file in place.rglob("*.parquet")):
        splits, names = _folder(place, keys, needed), None
    else:
        splits, names = _table(keys, needed)
    present = {caption for records in splits.values() for caption in records.dataset[CAPTION][:]}
    return splits, list(names or sorted(present))


def _table(keys: Captions, needed: bool) -> tuple[dict[str, Records], list[str] | None]:
    """From parquet files, the hub, or folders of classes; with the names of the classes, if it has some."""
    splits = read(keys.path, images=[keys.image])
    need_columns(splits, keys.image)
    made = {}
    for split, records in splits.items():
        dataset = records.dataset.select_columns([keys.image])
        dataset = dataset.rename_column(keys.image, IMAGE) if keys.image != IMAGE else dataset
        made[split] = Records(dataset.add_column(CAPTION, _column(records, keys, needed)), records.name)
    features = next(iter(splits.values())).dataset.features if keys.prompt is None else {}
    return made, getattr(features.get(keys.caption), "names", None)


def _column(records: Records, keys: Captions, needed: bool) -> list[str]:
    """The captions of records, in their order."""
    if keys.prompt is not None:
        return [keys.prompt] * len(records)
    if not needed and keys.caption not in records.dataset.column_names:
        return [""] * len(records)
    need_columns({"": records}, keys.caption)
    names = getattr(records.dataset.features[keys.caption], "names", None)
    captions = []
    for index, value in enumerate(records.dataset[keys.caption][:]):
        if isinstance(value, int):
            value = str(value) if names is None else names[value] if 0 <= value < len(names) else None
        captions.append(_checked(value, records.name(index), keys.caption, needed))
    return captions


def _checked(caption: Any, name: str, column: str | None, needed: bool) -> str:
    """The caption. ``name`` of its row, and its ``column`` there; or of the file that is the caption."""
    if isinstance(caption, str) and caption.strip():
        return caption
    if needed:
        found = "the file is empty" if column is None else f"{column!r} is {caption!r}"
        raise ValueError(f"{name}: {found}, expected a caption")
    return ""


def _folder(folder: Path, keys: Captions, needed: bool) -> dict[str, Records]:
    """From pictures at any depth, sorted by path: those below a folder that is named like a split are that split's, and
    all are train's if there is none."""
    import datasets

    pictures = sorted(picture_files(folder))
    listed = {} if keys.prompt else dict(_listed(folder, set(pictures), keys.caption))
    splits = [part.name for part in folder.iterdir() if part.is_dir() and split_name(part.name) in SPLITS]
    rows: dict[str, list[tuple[str, str, str]]] = {}
    beside_used = False
    for file in pictures:
        parts = file.relative_to(folder).parts
        split = split_name(parts[0]) if parts[0] in splits and len(parts) > 1 else "train"
        name, beside = str(file), file.with_suffix(".txt")
        if keys.prompt is not None:
            caption = keys.prompt
        elif file in listed:
            name = f"{listed[file][0]} ({file.name})"
            caption = _checked(listed[file][1], name, keys.caption, needed)
        elif beside.is_file():
            caption = _checked(read_text(beside).strip(), str(beside), None, needed)
            beside_used = True
        elif needed:
            raise ValueError(
                f"{file} has no caption: no {METADATA[0]} (or .csv, .parquet) names it, there is no {beside.name} "
                "beside it, and task.data.prompt is not set"
            )
        else:
            caption = ""
        rows.setdefault(split, []).append((str(file), caption, name))
    if beside_used and needed:
        _need_pictures(folder, {file.with_suffix(".txt") for file in pictures})
    if not rows:
        raise ValueError(f"{folder}: no pictures and no parquet files in it")
    features = datasets.Features({IMAGE: datasets.Image(decode=False), CAPTION: datasets.Value("string")})
    made = {}
    for split, some in rows.items():
        files, captions, names = (list(column) for column in zip(*some, strict=True))
        made[split] = Records(
            datasets.Dataset.from_dict({IMAGE: files, CAPTION: captions}, features=features), names.__getitem__
        )
    return made


def _need_pictures(folder: Path, known: set[Path]) -> None:
    """Raise ValueError for a file of a caption that is beside no picture."""
    for file in sorted(folder.rglob("*.txt")):
        if file not in known and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            raise ValueError(f"{file}: there is no picture of this name beside it; move it away if it is no caption")


def _listed(folder: Path, pictures: set[Path], column: str) -> Iterator[tuple[Path, tuple[str, Any]]]:
    """What the folder's metadata files say: a picture, with the row that names it and its caption."""
    seen: dict[Path, str] = {}
    for metadata in sorted(file for file in folder.rglob("metadata.*") if file.name in METADATA):
        for place, row in rows_of(metadata):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or column not in row:
                raise ValueError(f"{place}: expected an object with 'file_name' and {column!r}, got {row!r:.80}")
            file = metadata.parent / row["file_name"]
            if not file.is_file():
                raise ValueError(f"{place}: there is no {file}")
            if file not in pictures:
                raise ValueError(f"{place}: {file} is hidden, not below {folder}, or not a picture by its ending")
            if file in seen:
                raise ValueError(f"{place}: {seen[file]} names {row['file_name']} too")
            seen[file] = place
            yield file, (place, row[column])


# ------------------------------------------------------------------------------------------------------------ examples


def split_captions(source: dict[str, Records], keys: Captions, seed: int) -> dict[str, Records]:
    """ "train", "validation" and "test", of the captions in ``keys.only`` if there are some."""
    if keys.only:
        wanted = set(keys.only)
        present = {caption for records in source.values() for caption in records.dataset[CAPTION][:]}
        if missing := wanted - present:
            raise ValueError(f"task.data.only={keys.only}: {keys.path} has no picture with caption {min(missing)!r}")
        source = {
            split: records.select(i for i, caption in enumerate(records.dataset[CAPTION][:]) if caption in wanted)
            for split, records in source.items()
        }
    if keys.reuse:
        train = source.get("train")
        source = {} if train is None else dict.fromkeys(SPLITS, train)
    return three(source, keys, seed, keys.path)


@dataclass
class Captioned:
    """Pictures from -1 to 1, and their captions.

    Attributes:
        records: with the columns `IMAGE` and `CAPTION`.
        channels: one or three.
        training: whether pictures are cropped and mirrored at random, and captions left out.
        prior: pictures of the class; each example brings one of them along.
    """

    records: Records
    keys: Captions
    channels: int
    training: bool = False
    prior: Captioned | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        pixels, geometry = self._shown(open_image(self.records, index, IMAGE, self.channels))
        caption = self.caption(index)
        if self.training and self.keys.drop and torch.rand(()) < self.keys.drop:
            caption = ""
        example = {"pixel_values": pixels, "prompts": caption, "geometry": geometry, "labels": index}
        return example if self.prior is None else {**example, "prior": self.prior[index % len(self.prior)]}

    def caption(self, index: int) -> str:
        return self._captions[index]

    @cached_property
    def _captions(self) -> list[str]:
        return self.records.dataset[CAPTION][:]

    def check(self) -> None:
        """Raise ValueError, naming the file, for a picture that can't be opened."""
        check_each([self.records], lambda records, index: open_image(records, index, IMAGE, self.channels))
        if self.prior is not None:
            self.prior.check()

    def _shown(self, picture: Any) -> tuple[Tensor, Tensor]:
        """(channels, size, size), and what SDXL is told of it: the picture's height and width, the crop's top and left,
        and the size twice."""
        import torch
        from torchvision.transforms.v2 import functional as V

        size, (width, height) = self.keys.size, picture.size
        scale = size / min(width, height)
        shape = [max(round(side * scale), size) for side in (height, width)]
        pixels = V.resize(V.to_dtype(V.to_image(picture), torch.float32, scale=True), shape, antialias=True)
        room = [side - size for side in shape]
        anywhere = self.training and self.keys.random_crop
        top, left = (int(torch.randint(most + 1, ())) if anywhere else most // 2 for most in room)
        pixels = pixels[:, top : top + size, left : left + size]
        if self.training and self.keys.mirror and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return pixels.as_subclass(torch.Tensor) * 2 - 1, torch.tensor([height, width, top, left, size, size]).float()
