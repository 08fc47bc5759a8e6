"""Conversations, prompts with their answers, and texts, from rows of columns.

A row is brought to one of TRL's forms: {"messages": [{"role", "content"}, …]}, {"prompt", "completion"}, or {"text"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flora_lab.tasks.data.records import Records
from flora_lab.tasks.data.rows import Rows, read_rows

ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT's and LLaVA's files spell them
CALLS = ("tool_calls", "function_call")  # as OpenAI's files spell them
FORMS = "messages, conversations, prompt and completion, or text"


@dataclass
class Chats(Rows):
    """Where the conversations come from."""

    test_path: str | None = field(
        default=None, metadata={"help": "likewise, to validate and test on in place of a share of path", "path": True}
    )
    test_subset: str | None = field(default=None, metadata={"help": "of a data set on the hub"})
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "columns to rename, {given: name}, such as {question: prompt}"}
    )

    def read(self) -> dict[str, Records]:
        """The rows of "train", and of "validation" and "test" where the source has them. Raises ValueError."""
        splits = super().read()
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
    parts, if there may be some. Raises ValueError if a message is empty or calls a tool, or none answers."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(f"the conversation is {messages!r:.80}; expected a list of messages")
    made = []
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from"))
        if not isinstance(role, str):
            raise ValueError(f"message {number} has no role, but {', '.join(message)}")
        what, content = f"message {number}, of {role},", message.get("content", message.get("value"))
        for call in CALLS:
            if message.get(call):
                raise ValueError(f"{what} calls a tool ({call}), which is not read; expected text alone")
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
        raise ValueError(f"{what} is {'null' if value is None else type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    return value
