"""`accelerate launch … -m flora.cli train` in two processes without an accelerator."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from test_task_semantic import tiny_data
from test_train import VIT, places

from flora.cli import main
from flora_lab.errors import ConfigError
from flora_lab.run.preflight import preflight
from flora_lab.settings import Comparison, Config
from processes import START, launch

ROOT = Path(__file__).parents[2]
JOB = ROOT / "configs" / "ade20k-internvit.yaml"


def sharded(rank: int, folder: Path, overrides: list[str]) -> None:
    """One process that accelerate believes to have a GPU once there is a group: without a GPU it does not shard."""

    def run(start: Callable[[], None]) -> None:
        def init_process_group(backend: str, timeout: timedelta, **ranks: int) -> None:
            assert timeout > timedelta(hours=12), "a process that judges alone keeps the other waiting"
            start()

        dist.init_process_group = init_process_group
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        kinds = {False: DistributedType.MULTI_CPU, True: DistributedType.MULTI_GPU}
        PartialState._prepare_backend = lambda *args: ("gloo", kinds[dist.is_initialized()])
        main(["train", str(folder / "job.yaml"), *overrides], standalone_mode=False)
        assert Accelerator().is_fsdp2

    launch(rank, folder, "fsdp2", ["-m", "flora.cli"], run)


def test_a_model_sharded_by_fsdp2_is_saved_and_comes_back(tmp_path):
    vit = ", ".join(f"{key}: {value}" for key, value in {"model_type": "internvl_vision", **VIT}.items())
    overrides = [
        *(key for key in tiny_data(tmp_path) if not key.startswith("task.backbone.config")),
        f"task.backbone.config={{{vit}}}",
        "budget=1500",
        "training.max_steps=2",
        "training.warmup_steps=0",
        "methods.flora.learning_rate=0.1",
        *places(tmp_path),
    ]
    job = yaml.safe_load(JOB.read_text())
    job["methods"] = {name: job["methods"][name] for name in ("full", "flora")}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    torch.multiprocessing.start_processes(sharded, (tmp_path, overrides), nprocs=2, start_method=START)
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    rows = {row["method"]: row for row in map(json.loads, lines)}
    assert rows["flora"]["loaded_difference"] < 1e-5 and rows["flora"]["merged_difference"] < 1e-4
    assert rows["flora"]["bytes"] and rows["full"]["bytes"]


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [("DEEPSPEED_ZERO_STAGE", "3", "take FSDP2"), ("USE_FSDP", "true", "comparison.norms=2: no process has a whole")],
)
def test_what_needs_a_whole_model_is_refused_where_there_is_none(variable, value, named, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ConfigError, match=named):
        preflight(Config(comparison=Comparison(norms=2)), [], [])
