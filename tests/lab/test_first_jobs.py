"""The jobs that a reader starts with, on the pages and of `flora init`: their keys exist, and with tiny models and data
they pass every check."""

import json
import textwrap

import pytest
import test_task_glue
import test_task_instance
import test_task_language
import test_task_oriented
import test_task_semantic
import test_task_text
import test_task_text_to_image
import test_task_visual
import yaml
from test_task_images import RESNET, parquet

import tiny_pipelines as pipelines
from flora_lab.loading import load_config
from flora_lab.run.preflight import preflight
from flora_lab.starter import starter
from flora_lab.tasks import TASKS
from test_docs import BLOCK, PAGES

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # for 4 bits


def jobs_of(page):
    """Each YAML block of a page as a job. A block that is indented replaces keys of the last whole job's task."""
    jobs = []
    for text in (text for kind, text in BLOCK.findall(page.read_text()) if kind == "yaml"):
        keys = yaml.safe_load(textwrap.dedent(text))
        jobs.append({**jobs[-1], "task": {**jobs[-1]["task"], **keys}} if text.startswith(" ") else keys)
    return jobs


def images(folder, task):
    parquet(folder / "train.parquet", [0, 1, 2] * 8)
    return [
        f"task.data.path={folder}",
        "task.model.name=null",
        f"task.model.config={json.dumps(RESNET.config)}",
        "budget=6000",
    ]


def texts(folder, task):
    data = test_task_text.write(folder / "data", test_task_text.ROWS)
    model = test_task_glue.tiny_model(folder / "model")
    return [f"task.data.path={data}", f"task.model.name={model}", "budget=600"]


def pictures(folder, task):
    place = test_task_text_to_image.pictures(folder / "data", 12)
    prior = [f"task.data.prior={place}"] if task["data"].get("prior") else []
    model = pipelines.save("sd", folder / "pipe")
    return [f"task.data.path={place}", *prior, "task.data.size=16", f"task.model.name={model}", "budget=12000"]


def chats(folder, task):
    model = test_task_language.tiny_model(folder / "model", **WIDE)
    rows = [{"messages": test_task_language.CHAT[1:]}] * 12
    place = test_task_language.lines(folder / "data" / "train.jsonl", rows).parent
    return [f"task.data.path={place}", "task.data.max_length=120", f"task.model.name={model}", "budget=3000"]


def talks(folder, task):
    place = test_task_visual.llava(folder / "data").parent
    return [f"task.data.path={place}", f"task.model.name={test_task_visual.saved(folder / 'model')}", "budget=3000"]


# the overrides that make a job of a task a tiny one
TWINS = {
    "image_classification": images,
    "glue": lambda folder, task: test_task_glue.tiny_keys(folder, task["subset"]),
    "text_classification": texts,
    "semantic_segmentation": lambda folder, task: test_task_semantic.tiny_data(folder),
    "instance_segmentation": lambda folder, task: test_task_instance.tiny_data(folder),
    "text_to_image": pictures,
    "language": chats,
    "visual_instruction": talks,
    "oriented_detection": lambda folder, task: test_task_oriented.tiny_data(folder),
}
JOBS = [(f"{page.stem}-{n}", job) for page in PAGES for n, job in enumerate(jobs_of(page))]
JOBS += [(f"init-{task}", yaml.safe_load(starter(task))) for task in TASKS]


@pytest.mark.parametrize("job", [pytest.param(job, id=name) for name, job in JOBS])
def test_a_first_job_passes_all_checks(job, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    load_config(tmp_path / "job.yaml")  # before its own model and data are replaced
    (tmp_path / "twin").mkdir()
    twin = TWINS[job["task"]["name"]](tmp_path / "twin", job["task"])
    config = load_config(tmp_path / "job.yaml", [*twin, f"output={tmp_path / 'run'}"])
    reasons = preflight(config, list(config.methods), [config.budget])
    assert {name for name, _ in reasons} == set(config.methods) and not any(reasons.values()), reasons
