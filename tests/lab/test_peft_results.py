"""Our rows beside the results of PEFT's method comparison."""

import json

import pytest

from flora_lab.analysis import peft_results
from flora_lab.analysis.fields import to_disk
from flora_lab.cli import analyse


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
        "num_trainable_params": 9175040,
        "file_size": 36715216,
        "metrics": metrics,
    }
    return {"run_info": {"experiment_name": name, "total_time": 1153.3}, "train_info": train, "meta_info": {}}


def row(variant, accuracy, rate=1e-4, **more):
    numbers = {"accuracy": accuracy}
    test = numbers | ({"forgetting": 0.012} if variant == "flora" else {})
    trial = {"variant": variant, "method": variant, "budget": 9175040, "seed": 0, "learning_rate": rate, "notes": []}
    times = {"seconds": 1200.4, "train_seconds": 950.2, "memory": 1, "memory_reserved": 2**34, "bytes": 2**20}
    sizes = {"adapter_parameters": 9175000, "head_parameters": 0, "train_loss": 0.61}
    subject = {"job": "metamathqa", "metric": "accuracy"}
    return {**subject, **trial, **sizes, **times, "validation": numbers, "test": test, **more}


def test_rows_and_results_stand_in_one_table(tmp_path):
    for name, accuracy, status in (("lora/a", 0.4784, "success"), ("full", 0.3, "success"), ("bad", 0.9, "canceled")):
        (tmp_path / f"{name.replace('/', '--')}.json").write_text(json.dumps(result(name, accuracy, status)))
    rows = [row("flora", 0.48), row("flora", 0.4, rate=1e-3), row("lora", 0.2, memory_reserved=None, memory=2**30)]
    table = peft_results.beside(rows, tmp_path)
    assert [line[0] for line in table.lines] == ["FLoRA, seed 0", "lora/a", "full", "LoRA, seed 0"]
    assert table.bold == {(0, 0), (3, 0)}
    assert table.lines[0][1:] == ["0.480", "0.610", "0.012", "950", "1,200", "16.00 GiB", "9,175,000", "1 MiB"]
    assert table.lines[1][1:] == ["0.478", "0.607", "0.050", "942", "1,153", "20.76 GiB", "9,175,040", "35 MiB"]
    assert table.lines[3][3] == "–" and table.lines[3][6] == "1.00 GiB"


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
