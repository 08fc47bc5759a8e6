"""Conversations about pictures, in the form of LLaVA's files or transformers': what they hold, checked, and as tokens
for a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.files import local_path
from flora_lab.tasks.data.chats import Chats, conversation
from flora_lab.tasks.data.pictures import opened
from flora_lab.tasks.data.records import Records
from flora_lab.tasks.data.tokens import IGNORED

IMAGE = "<image>"  # where a picture stands in a text
FOLDER = "folder of the file"  # column
SPELLINGS = re.compile(  # of this and others, in other programs and models: <img>, <|image_1|>, <start_of_image>, [IMG]
    r"<\|?/?(?:[a-z]+[_-])*(?:(?:img|image|picture|video|vision|audio)[\w-]*|im(?:[_-]\w+)?)\|?>|\[/?img\w*\]",
    re.IGNORECASE,
)


@dataclass
class Dialogues(Chats):
    images: str | None = field(
        default=None, metadata={"help": "folder that pictures' paths start from; default: the file's", "path": True}
    )
    image: str = field(default="image", metadata={"help": "column of the picture, or of a list of them"})
    answers: str = field(default="answers", metadata={"help": "column of people's answers, for task.evaluate=vqa"})
    markup: bool = field(
        default=False, metadata={"help": "texts such as <img> and <video> are HTML, say, and stand for no picture"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens per example, at most", "least": 2})

    def read(self) -> dict[str, Records]:
        """The rows of files know the folder that their pictures' paths start from: that of their own file."""
        splits = super().read()
        for split, records in splits.items():
            place = local_path(self.test_path if self.test_path and split != "train" else self.path)
            if place and isinstance(records.dataset, list):
                folder = str(place if place.is_dir() else place.parent)
                records.dataset = [
                    {**row, FOLDER: folder} if isinstance(row, Mapping) else row for row in records.dataset
                ]
        return splits


@dataclass(frozen=True)
class Dialogue:
    """``messages``: with parts of text and pictures as content. ``cells``: {"bytes", "path"} or Pillow's, in order."""

    messages: list[dict[str, Any]]
    cells: list[Any]

    @property
    def answer(self) -> str:
        """The last one."""
        return self.messages[-1]["content"][0]["text"]

    def pictures(self, name: str, column: str) -> list[Any]:
        """Decoded. Raises ValueError naming the row."""
        return [opened(cell, name, column, 3) for cell in self.cells]


def dialogue(row: Mapping[str, Any], keys: Dialogues, tokens: Collection[str]) -> Dialogue:
    """A row of LLaVA's form, or of transformers'. ``tokens``: how the model itself spells pictures and the like.

    Raises ValueError if it has no answer, not one `IMAGE` for each picture, or what looks like another such token.
    """
    given = row["messages"] if row.get("messages") is not None else row.get("conversations")
    if given is None:
        columns = ", ".join(name for name in row if name != FOLDER)
        raise ValueError(f"has the columns {columns}; expected conversations or messages")
    messages, cells = conversation(given, IMAGE), _pictures(row, given, keys)
    users = [message["content"] for message in messages if message["role"] == "user"]
    count, text = sum(one.count(IMAGE) for one in users), " ".join(message["content"] for message in messages)
    if known := [token for token in tokens if token != IMAGE and token in text]:
        raise ValueError(f"unknown image token {known[0]!r}, which is the model's own; expected {IMAGE!r}")
    strange = [match[0] for match in SPELLINGS.finditer(text) if match[0] != IMAGE]
    if strange and (not keys.markup or count != len(cells)):
        remedy = "" if keys.markup else ", or task.data.markup=true if it is mere text"
        raise ValueError(f"unknown image token {strange[0]!r}; expected {IMAGE!r}{remedy}")
    if text.count(IMAGE) != count:
        raise ValueError(f"only a user's message may hold {IMAGE!r}")
    if count != len(cells):
        raise ValueError(f"{IMAGE!r} stands in it {count} times, but column {keys.image!r} has {len(cells)} pictures")
    return Dialogue([{**message, "content": _parts(message["content"])} for message in messages], cells)


def _pictures(row: Mapping[str, Any], messages: list[Mapping[str, Any]], keys: Dialogues) -> list[Any]:
    """Of the row's column or, if it has none, of the parts of its messages."""
    folder = Path(keys.images or row.get(FOLDER, ""))
    contents = [message.get("content", message.get("value")) for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if part["type"] == "image"]
    own = [part[key] for part in parts for key in ("image", "path", "url") if part.get(key)]
    cells = _cells(row.get(keys.image), folder, f"column {keys.image!r}")
    if own and cells:
        raise ValueError(f"has pictures both in column {keys.image!r} and in its messages")
    return cells or _cells(own, folder, "the picture of a message")


def _cells(value: Any, folder: Path, what: str) -> list[Any]:
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [cell for one in value for cell in _cells(one, folder, what)]
    if isinstance(value, str):
        return [{"path": str(folder / value)}]
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return [dict(value)]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return [{"path": str(folder / value["path"])}]
    if hasattr(value, "convert"):  # Pillow's
        return [value]
    raise ValueError(f"{what} is {value!r:.80}; expected a path, a picture, or a list of them")


def _parts(text: str) -> list[dict[str, str]]:
    """Text and pictures in turn; the template puts white space between them."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return parts


def spread(ids: list[int], labels: list[int], seen: list[int], image: int) -> list[int]:
    """The labels of ``ids``, in which one token ``image`` stands for a picture, for the tokens that the model reads.

    In ``seen`` each picture has become as many tokens as the model needs; all else is as in ``ids``. Raises ValueError
    if it is not.
    """
    cuts = [index for index, token in enumerate(ids) if token == image]
    bounds = list(zip([-1, *cuts], [*cuts, len(ids)], strict=True))
    spreading, place = [IGNORED] * len(seen), 0
    for number, (before, after) in enumerate(bounds):
        piece = ids[before + 1 : after]
        last = number == len(bounds) - 1
        places = [len(seen) - len(piece)] if last and cuts else range(place, len(seen) - len(piece) + 1)
        place = next((at for at in places if at >= place and seen[at : at + len(piece)] == piece), -1)
        if place < 0 or (not number and place):
            raise ValueError("the processor changes more of its text than the pictures")
        spreading[place : place + len(piece)] = labels[before + 1 : after]
        place += len(piece)
    return spreading
