"""Conversations, prompts with their answers, and texts: read from files or the hub, row by row.

A row is brought to one of TRL's forms: {"messages": [{"role", "content"}, …]}, {"prompt", "completion"}, or {"text"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.files import local_path
from flora_lab.tasks.data.arithmetic import ARITHMETIC, problems
from flora_lab.tasks.data.records import SPLITS, Portions, Records, split_name
from flora_lab.tasks.data.tables import SEPARATORS, read_table
from flora_lab.tasks.data.texts import lines_of, parse_json, read_text

ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT's and LLaVA's files spell them
ENDINGS = (".jsonl", ".json", ".parquet", *SEPARATORS)
FORMS = "messages, conversations, prompt and completion, or text"


@dataclass
class Chats(Portions):
    """Where the conversations come from."""

    path: str = field(
        default="",
        metadata={
            "help": "JSON lines, JSON, CSV, TSV or parquet: a file, a folder of splits, or a name on the hub",
            "path": True,
        },
    )
    subset: str | None = field(default=None, metadata={"help": "of a data set on the hub"})
    test_path: str | None = field(
        default=None, metadata={"help": "likewise, to validate and test on in place of a share of path", "path": True}
    )
    test_subset: str | None = field(default=None, metadata={"help": "of a data set on the hub"})
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "columns to rename, {given: name}, such as {question: prompt}"}
    )

    def read(self) -> dict[str, Records]:
        """The rows of "train", and of "validation" and "test" where the source has them. Raises ValueError."""
        if not self.path:
            raise ValueError("task.data.path: expected a file, a folder, or a name on the hub")
        splits = read_rows(self.path, self.subset)
        if self.test_path:
            other = read_rows(self.test_path, self.test_subset)
            test = other.pop("test", None) or other.pop("train")
            splits = {
                "train": splits["train"],
                "validation": other.get("validation") or other.get("train"),
                "test": test,
            }
        return {split: records for split, records in splits.items() if records is not None}

    def renamed(self, row: Any) -> dict[str, Any]:
        """Raises ValueError if the row has no columns."""
        if not isinstance(row, Mapping):
            raise ValueError(f"{row!r:.80} is not an object of columns")
        return {self.columns.get(name, name): value for name, value in row.items()}


# ----------------------------------------------------------------------------------------------------------- reading


def read_rows(path: str, subset: str | None) -> dict[str, Records]:
    """Raises ValueError naming ``path``, or file and line."""
    import datasets

    datasets.disable_progress_bars()
    if path in ARITHMETIC:
        return {"train": Records(problems(ARITHMETIC[path]), lambda index: f"{path}, row {index}")}
    place = local_path(path)
    if place is None:
        try:
            found = datasets.load_dataset(path, subset)
        except Exception as error:  # of the hub's and datasets' many classes
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        splits = {split_name(name): Records(rows, _namer(f"{path}, {name}")) for name, rows in found.items()}
    else:
        splits = _files(place)
    if "train" not in splits and set(splits) != {"test"}:
        raise ValueError(f"{path} has no train split, but {', '.join(splits)}")
    return splits


def _files(place: Path) -> dict[str, Records]:
    """A split's files have its name, or lie in a folder of its name; a file with another name is train."""
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in ENDINGS)
    if not files:
        raise ValueError(f"{place}: no file that ends in {', '.join(ENDINGS)}")
    rows: dict[str, list] = {}
    places: dict[str, list[str]] = {}
    for file in files:
        names = (re.split(r"[-_.]", file.stem)[0], file.absolute().parent.name) if len(files) > 1 else ()
        split = next((split for split in map(split_name, names) if split in SPLITS), "train")
        for where, row in _parquet(file) if file.suffix == ".parquet" else _text_rows(file):
            rows.setdefault(split, []).append(row)
            places.setdefault(split, []).append(where)
    if not rows:
        raise ValueError(f"{place} is empty")
    return {split: Records(rows[split], places[split].__getitem__) for split in rows}


def _text_rows(file: Path) -> list[tuple[str, Any]]:
    """Every row of JSON lines, a JSON list or a table, with its place."""
    text = read_text(file)
    if file.suffix in SEPARATORS:
        return read_table(file, text)
    if text.lstrip().startswith("["):
        return [(f"{file}, row {index}", row) for index, row in enumerate(parse_json(text, file))]
    return [(place, parse_json(line, place)) for place, line in lines_of(text, file)]


def _parquet(file: Path) -> list[tuple[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except Exception as error:  # of pyarrow's many classes
        raise ValueError(f"{file}: {error}") from error
    return [(f"{file}, row {index}", row) for index, row in enumerate(rows)]


def _namer(source: str) -> Any:
    return lambda index: f"{source}, row {index}"


# --------------------------------------------------------------------------------------------------------- its forms


def formed(row: Mapping[str, Any], prompt: str | None = None, completion: str | None = None) -> dict[str, Any]:
    """The row in one of TRL's forms. ``prompt``, ``completion``: templates with columns in braces, in place of columns.

    Raises ValueError if a column is missing, a text is empty, or a conversation has no answer.
    """
    if prompt or completion:
        answer = filled(completion or "{completion}", row, needed=True)
        return {"prompt": filled(prompt or "{prompt}", row), "completion": answer}
    messages = row["messages"] if row.get("messages") is not None else row.get("conversations")
    if messages is None and "prompt" in row and "completion" in row:
        if not isinstance(row["prompt"], list) or not isinstance(row["completion"], list):
            return {name: _text(row[name], f"column {name!r}") for name in ("prompt", "completion")}
        messages = [*row["prompt"], *row["completion"]]
    if messages is not None:
        return {"messages": conversation(messages)}
    if "text" in row:
        return {"text": _text(row["text"], "column 'text'")}
    raise ValueError(f"has the columns {', '.join(row)}; expected {FORMS}")


def filled(template: str, row: Mapping[str, Any], needed: bool = False) -> str:
    """The template with the row's columns; ``needed``: they may not be empty."""
    for name in re.findall(r"\{(\w+)\}", template):
        if name not in row:
            raise ValueError(f"no column {name!r}, but {', '.join(row)}")
        if needed:
            _text(row[name], f"column {name!r}")
    return re.sub(r"\{(\w+)\}", lambda match: "" if row[match[1]] is None else str(row[match[1]]), template)


def conversation(messages: Any, image: str | None = None) -> list[dict[str, str]]:
    """Messages of role and content, which end with an answer. ``image``: what stands in a text for a picture among its
    parts, if there may be some. Raises ValueError if a message is empty, or none answers."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(f"the conversation is {messages!r:.80}; expected a list of messages")
    made = []
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from"))
        if not isinstance(role, str):
            raise ValueError(f"message {number} has no role, but {', '.join(message)}")
        what, content = f"message {number}, of {role},", message.get("content", message.get("value"))
        content = _joined(content, what, image) if isinstance(content, list) else content
        made.append({"role": ROLES.get(role, role), "content": _text(content, what)})
    if not any(message["role"] == "assistant" for message in made):
        raise ValueError("a conversation without an answer: no message is the assistant's")
    if made[-1]["role"] != "assistant":
        raise ValueError(f"a conversation without an answer: its last message is the {made[-1]['role']}'s")
    return made


def _joined(parts: list[Any], what: str, image: str | None) -> str:
    """The text of transformers' form of a content: [{"type": "image"}, {"type": "text", "text": …}, …]."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else image if kind == "image" else None
        if not isinstance(text, str):
            accepted = 'of type "text" with its text' + (' or "image"' if image else "")
            raise ValueError(f"{what} has the part {part!r:.80}; expected one {accepted}")
        texts.append(text)
    return "".join(texts)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value
