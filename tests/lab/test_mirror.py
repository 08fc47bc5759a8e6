"""A job's folder on shared storage, and a machine of a cluster that dies."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import ray
from ray.cluster_utils import Cluster
from test_compare import GRID, SHORT, flora_compare, lines, plain, with_methods

from flora_lab.errors import ConfigError
from flora_lab.loading import load_config
from flora_lab.run.base import base_model
from flora_lab.run.fit import Checkpoints
from flora_lab.run.folder import Trial
from flora_lab.run.job import Job, _work
from flora_lab.run.mirror import Mirror
from flora_lab.run.trial import run
from flora_lab.settings import Config

URL = "memory://bucket/job"


@pytest.fixture(autouse=True)
def empty():
    storage = fsspec.filesystem("memory")
    storage.rm("/", recursive=True)
    return storage


def mirror(folder: Path) -> Mirror:
    return Mirror(Config(output=str(folder), mirror=URL))


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_back_and_what_was_deleted_does_not(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, trial__model="abc", trial__old="x", other="y")
    mirror(here).push(here / "trial")
    (here / "trial" / "old").unlink()
    mirror(here).push(here / "trial")
    mirror(there).pull(there / "trial")
    assert content(there) == {"trial/model": "abc"}


@pytest.mark.parametrize("url", ["memory://bucket/job", "file://{}/job"])
def test_a_deleted_folder_leaves_no_empty_one_and_no_other_goes(tmp_path, url):
    here = tmp_path / "here"
    copy = Mirror(Config(output=str(here), mirror=url.format(tmp_path)))
    write(here, trial__checkpoints__1__weights="w", trial__model="m", trial__a__b__c="c", trial__keys__a="a")
    copy.push(here / "trial")
    for other in ("trial/empty", "trial/checkpoints/2/empty", "empty"):
        copy.files.makedirs(f"{copy.root}/{other}")
    for name in ("checkpoints", "a"):
        shutil.rmtree(here / "trial" / name)
    (here / "trial" / "keys" / "a").unlink()
    copy.push(here / "trial")
    left = {os.path.relpath(path, copy.root) for path in copy.files.find(copy.root, withdirs=True)} - {"."}
    theirs = {"empty", "trial/empty", "trial/checkpoints", "trial/checkpoints/2", "trial/checkpoints/2/empty"}
    assert left == {"trial", "trial/model", "trial/keys"} | theirs


def test_the_longer_file_is_the_newer_one(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, rows="1\n2\n")
    write(there, rows="1\n")
    mirror(here).push(here, ["rows"])
    mirror(there).pull(there, ["rows"])
    assert content(there) == {"rows": "1\n2\n"}
    write(there, rows="1\n2\n3\n")
    mirror(there).pull(there, ["rows"])
    assert content(there) == {"rows": "1\n2\n3\n"}


def test_a_checkpoint_s_mark_arrives_last_and_leaves_first(tmp_path, empty, monkeypatch):
    write(tmp_path, **{"trial__checkpoint-1__complete_json": "{}", "trial__checkpoint-1__weights": "w"})
    order = []
    for name in ("put_file", "rm_file"):
        real = getattr(type(empty), name)
        monkeypatch.setattr(empty, name, lambda *args, real=real: (order.append(args[-1]), real(empty, *args)))
    mirror(tmp_path).push(tmp_path / "trial")
    for path in (tmp_path / "trial" / "checkpoint-1").iterdir():
        path.unlink()
    mirror(tmp_path).push(tmp_path / "trial")
    marks = [path.endswith("complete.json") for path in order]
    assert marks == [False, True, True, False]


def test_a_storage_that_cannot_be_reached_is_named(tmp_path):
    with pytest.raises(ConfigError, match="mirror=nowhere://x: .*nowhere"):
        Mirror(Config(output=str(tmp_path), mirror="nowhere://x"))


def test_another_machine_goes_on_where_the_first_one_stopped(tmp_path, empty):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = flora_compare(*with_methods(tmp_path / "one", "head"), *SHORT, *GRID, f"mirror={URL}")
    assert first.exit_code == 0, first.output
    rows = lines(tmp_path / "one")
    (base,) = (tmp_path / "one" / "cache").glob("*.safetensors")
    # as if the first machine had been killed before its last row
    whole = empty.cat_file("/bucket/job/results.jsonl")
    empty.pipe_file("/bucket/job/results.jsonl", whole[: whole.rstrip().rfind(b"\n") + 1])
    second = flora_compare(*with_methods(tmp_path / "two", "head"), *SHORT, *GRID, f"mirror={URL}")
    assert second.exit_code == 0, second.output
    again = lines(tmp_path / "two")
    assert (tmp_path / "two" / "cache" / base.name).read_bytes() == base.read_bytes()
    assert not (tmp_path / "two" / "run" / "logs" / "base").exists(), "it trained the base model again"
    assert again[:-1] == rows[:-1]
    same = [
        {k: v for k, v in json.loads(row).items() if k in ("seed", "learning_rate", "test")}
        for row in (rows[-1], again[-1])
    ]
    assert same[0] == same[1]
    assert empty.cat_file("/bucket/job/results.jsonl").decode().splitlines() == again
    assert empty.exists("/bucket/job/report.html") and empty.glob("/bucket/job/trials/*/trained/*.safetensors")


def test_a_trial_elsewhere_gets_the_base_model_through_the_mirror(tmp_path):
    (tmp_path / "one").mkdir()
    keys = [*with_methods(tmp_path / "one", "head"), *SHORT, *GRID, f"mirror={URL}"]
    config = load_config(str(keys[0]), list(map(str, keys[1:])))
    job = Job(config)
    job.open()
    file = job.base_file()
    file.unlink()
    trial = Trial("head", None, 0, 0.1)
    assert run(config, trial, file, job.folder / "trials" / trial.name)["steps"] == 2
    file.unlink()
    with pytest.raises(ConfigError, match="is not on this machine: set `mirror`"):
        base_model(config.task, file, 0)


def test_a_fresh_start_deletes_the_job_s_own_files_there_and_no_others(tmp_path, empty):
    job, *keys = with_methods(tmp_path, "head")
    config = load_config(str(job), [*map(str, keys), f"mirror={URL}"])
    Job(config).open()
    for name in ("precious", "trials/old/model"):
        empty.pipe_file(f"/bucket/job/{name}", b"x")
    Job(replace(config, fresh=True)).open()
    assert {"/bucket/job/precious", "/bucket/job/config.yaml"} < set(empty.find("/bucket"))
    assert not empty.exists("/bucket/job/trials")


def test_a_trial_does_not_go_on_from_one_with_other_keys(tmp_path, monkeypatch):
    """A machine of a cluster may have one, which `fresh=true` can't reach."""

    def fit(*args, **options):
        nonlocal found
        found = content(folder).keys() & {"checkpoints/checkpoint-1/complete.json"}
        write(folder, **{"checkpoints/checkpoint-1/complete.json": "{}"})
        raise KeyboardInterrupt

    job, *keys = with_methods(tmp_path, "head")
    folder, found = tmp_path / "trial", None
    monkeypatch.setattr("flora_lab.run.trial.fit", fit)
    for more, goes_on in (
        ([], False), ([], True), (["training.eval_steps=5"], True), (["training.weight_decay=0.5"], False)
    ):  # fmt: skip
        config = load_config(str(job), [*map(str, keys), *more])
        with pytest.raises(KeyboardInterrupt):
            run(config, Trial("head", None, 0, 0.1), None, folder)
        assert bool(found) == goes_on, more


def test_a_machine_that_dies_costs_no_run_and_repeats_none(tmp_path, monkeypatch):
    """Two nodes with a GPU each, or so they say. Relative paths are folders of each: they share the mirror alone."""

    def add(node):
        (tmp_path / node).mkdir()
        monkeypatch.chdir(tmp_path / node)
        return cluster.add_node(num_cpus=4, num_gpus=1, include_dashboard=False)

    def held(*call):
        """A trial that says where each epoch begins, and waits after its first checkpoint."""
        begin = Checkpoints.on_epoch_begin

        def on_epoch_begin(self, args, state, control, **kwargs):
            begin(self, args, state, control, **kwargs)
            gpu, process = os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()
            (said / f"{Path.cwd().name} {gpu} {process} {call[1].name} {state.global_step}").touch()
            while state.global_step and not (said / "go").exists():
                time.sleep(0.05)

        Checkpoints.on_epoch_begin = on_epoch_begin
        return _work(*call)

    def epochs(node):
        """(GPU, process, trial, step) of each epoch that has begun there."""
        return sorted(tuple(path.name.split()[1:]) for path in said.glob(f"{node} *"))

    (said := tmp_path / "said").mkdir()
    job, *keys = with_methods(tmp_path, "head")
    keys += [*SHORT, "training.max_steps=null", "training.epochs=2", "comparison.rates=[1,3]", "--seeds=0"]
    whole = flora_compare(job, *keys)
    assert whole.exit_code == 0, whole.output

    ray.shutdown()
    cluster, bucket = Cluster(), tmp_path / "bucket"
    keys += ["output=run", "cache=cache", f"mirror=file://{bucket}", "--engine=ray", "--workers=2"]
    try:
        second = (add("one"), add("two"))[1]
        monkeypatch.chdir(tmp_path / "one")
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setattr("flora_lab.run.job._work", held)
        with ThreadPoolExecutor(1) as thread:
            compared = thread.submit(flora_compare, job, *keys)
            while not (len(epochs("one")) == len(epochs("two")) == 2):
                assert not compared.done(), compared.result().output
                time.sleep(0.05)
            (first,), (killed,) = ({trial for _, _, trial, _ in epochs(node)} for node in ("one", "two"))
            assert list(bucket.glob(f"trials/{killed}/checkpoints/*/complete.json"))
            cluster.remove_node(second, allow_graceful=False)
            with suppress(ProcessLookupError):  # under load it outlives its node, and would end its trial
                os.kill(int(epochs("two")[0][1]), signal.SIGKILL)
            (said / "go").touch()
            assert compared.result().exit_code == 0, compared.result().output
    finally:
        ray.shutdown()
        cluster.shutdown()
    # it goes on where it was, once the other GPU is free, in a process of its own
    assert {(gpu, trial, step) for gpu, _, trial, step in epochs("one")} == {
        ("0", first, "0"), ("0", first, "2"), ("0", killed, "2")
    }  # fmt: skip
    assert len(epochs("one")) == 3 and len({process for _, process, _, _ in epochs("one")}) == 2
    assert plain(tmp_path / "one") == plain(tmp_path)
    assert (bucket / "results.jsonl").read_text().splitlines() == lines(tmp_path / "one")
    assert {path.parts[-3] for path in bucket.glob("trials/*/trained/*.safetensors")} == {first, killed}
    assert not list(bucket.glob("trials/*/checkpoints/*/*"))
