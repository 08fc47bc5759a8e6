"""Our rows beside the results of PEFT's method comparison."""

import json

import pytest
import torch

from flora_lab.analysis import peft_results
from flora_lab.analysis.fields import to_disk
from flora_lab.cli import analyse
from flora_lab.run.machine import Reserved


def result(name, accuracy, status="success"):
    """As PEFT's script writes it, without what is not read."""
    metrics = [
        {"step": 250, "valid accuracy": 0.9},
        {"test accuracy": accuracy, "train loss": 0.607, "forgetting": 0.05},
    ]
    train = {
        "status": status,
        "train_time": 941.96,
        "accelerator_memory_max": 22292725760,
        "accelerator_memory_reserved_avg": 11868055246,
        "num_trainable_params": 9175040,
        "file_size": 36715216,
        "metrics": metrics,
    }
    return {"run_info": {"experiment_name": name, "total_time": 1153.3}, "train_info": train, "meta_info": {}}


def row(variant, accuracy, rate=1e-4, **more):
    numbers = {"accuracy": accuracy}
    test = numbers | ({"forgetting": 0.012} if variant == "flora" else {})
    trial = {"variant": variant, "method": variant, "budget": 9175040, "seed": 0, "learning_rate": rate, "notes": []}
    times = {"seconds": 1200.4, "train_seconds": 950.2, "memory": 1, "bytes": 2**20}
    held = {"memory_reserved": 2**34, "memory_reserved_mean": 2**33}
    sizes = {"adapter_parameters": 9175000, "head_parameters": 0, "train_loss": 0.61}
    subject = {"job": "metamathqa", "metric": "accuracy"}
    return {**subject, **trial, **sizes, **times, **held, "validation": numbers, "test": test, **more}


def test_rows_and_results_stand_in_one_table(tmp_path):
    for name, accuracy, status in (("lora/a", 0.4784, "success"), ("full", 0.3, "success"), ("bad", 0.9, "canceled")):
        (tmp_path / f"{name.replace('/', '--')}.json").write_text(json.dumps(result(name, accuracy, status)))
    on_cpu = {"memory_reserved": None, "memory_reserved_mean": None, "memory": 2**30}
    rows = [row("flora", 0.48), row("flora", 0.4, rate=1e-3), row("lora", 0.2, **on_cpu)]
    table = peft_results.beside(rows, tmp_path)
    assert [line[0] for line in table.lines] == ["FLoRA, seed 0", "lora/a", "full", "LoRA, seed 0"]
    assert table.bold == {(0, 0), (3, 0)}
    ours, theirs = ["9,175,000", "1 MiB"], ["9,175,040", "35 MiB"]
    assert table.lines[0][1:] == ["0.480", "0.610", "0.012", "950", "1,200", "16.00 GiB", "8.00 GiB", *ours]
    assert table.lines[1][1:] == ["0.478", "0.607", "0.050", "942", "1,153", "20.76 GiB", "11.05 GiB", *theirs]
    assert table.lines[3][3] == "–" and table.lines[3][6:8] == ["1.00 GiB", "–"]


def test_the_command_writes_the_table(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "lora.json").write_text(json.dumps(result("lora/a", 0.4784)))
    (tmp_path / "results.jsonl").write_text(json.dumps(to_disk(row("flora", 0.48))))
    analyse.main(
        [str(tmp_path), "--out", str(tmp_path / "out"), "--peft", str(tmp_path / "theirs")], standalone_mode=False
    )
    assert "| lora/a " in (tmp_path / "out" / "peft.md").read_text()


@pytest.mark.parametrize(
    "content", ["{", "[]", json.dumps({"run_info": {}}), json.dumps(result("a", 1) | {"run_info": {}})]
)
def test_a_file_that_is_no_result_is_named(content, tmp_path):
    with pytest.raises(ValueError, match="no results of PEFT"):
        peft_results.beside([row("flora", 0.5)], tmp_path)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a.json is not a result of PEFT's method comparison"):
        peft_results.beside([row("flora", 0.5)], tmp_path)


def test_reserved_memory_is_counted_step_by_step(monkeypatch):
    assert Reserved().numbers() == {"memory_reserved": None, "memory_reserved_mean": None}
    held = iter([2, 4, 9])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 10)
    reserved = Reserved()
    for _ in range(3):
        reserved.on_step_end()
    assert reserved.numbers() == {"memory_reserved": 10, "memory_reserved_mean": 5}
