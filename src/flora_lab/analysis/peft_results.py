"""Rows beside the results of PEFT's own method comparison (huggingface/peft, method_comparison/*/results/*.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flora_lab.analysis.fields import Row
from flora_lab.analysis.results import chosen, finite, score
from flora_lab.analysis.style import styles
from flora_lab.analysis.tables import Table, seconds, size

COLUMNS = [
    "experiment",
    "test accuracy",
    "train loss",
    "forgetting",
    "train time",
    "total time",
    "accelerator memory, max",
    "accelerator memory, mean",
    "trainable parameters",
    "file size",
]
NOTE = (
    "In bold: rows of ours, at their best learning rate, seed by seed; the others are PEFT's. Times in seconds, of "
    "training without evaluation and of everything. Machines may differ. Forgetting is how much the loss of other "
    "texts rises: ours of each next token, but PEFT's script has taken that of the token just read. Compare it among "
    "rows of ours, or among PEFT's. The mean is over the steps of training, of what PyTorch reserves."
)


def beside(rows: Iterable[Row], folder: str | Path) -> Table:
    """Our rows and the JSON files in ``folder``, by test accuracy. Raises ValueError naming a file that is no
    result."""
    rows = chosen(rows)
    names = styles(rows)
    lines = [(_of_row(row, names[row["job"], row["variant"]].label), True) for row in rows]
    lines += [(result, False) for file in _files(Path(folder).expanduser()) if (result := _of_file(file))]
    lines.sort(key=lambda line: -finite(line[0][1]))
    ours = {(number, 0) for number, (_, own) in enumerate(lines) if own}
    return Table("beside PEFT’s method comparison", COLUMNS, [_cells(values) for values, _ in lines], ours, NOTE)


def _of_row(row: Row, label: str) -> Sequence[Any]:
    return (
        f"{label}, seed {row['seed']}",
        score(row, "test"),
        row.get("train_loss"),
        row["test"].get("forgetting"),
        row.get("train_seconds"),
        row.get("seconds"),
        row.get("memory_reserved") or row.get("memory"),
        row.get("memory_reserved_mean"),
        row["adapter_parameters"] + row["head_parameters"],
        row.get("bytes"),
    )


def _of_file(file: Path) -> Sequence[Any] | None:
    """None if the experiment did not succeed."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        run, train = content["run_info"], content["train_info"]
        if train["status"] != "success":
            return None
        last = train["metrics"][-1]
        return (
            run["experiment_name"],
            next(value for name, value in last.items() if name.startswith("test ")),
            last["train loss"],
            last.get("forgetting"),
            train["train_time"],
            run["total_time"],
            train["accelerator_memory_max"],
            train.get("accelerator_memory_reserved_avg"),
            train["num_trainable_params"],
            train["file_size"],
        )
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not a result of PEFT's method comparison ({reason})") from error


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: no results of PEFT's method comparison (*.json) in it")
    return files


def _cells(values: Sequence[Any]) -> list[str]:
    name, accuracy, loss, forgetting, train, total, most, mean, parameters, file_size = values
    return [
        name,
        f"{accuracy:.3f}",
        _number(loss),
        _number(forgetting),
        seconds(train),
        seconds(total),
        size(most),
        size(mean),
        f"{parameters:,}",
        size(file_size),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
