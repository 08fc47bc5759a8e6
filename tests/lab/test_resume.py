"""After a kill a training of any task goes on, and ends with the numbers of one that nothing stopped.

kill -9 leaves what is in a folder at that moment, so copies of the folder stand for kills here. Real kills, and
half a checkpoint, are in test_train.py.
"""

import json
import shutil
from itertools import product

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_first_jobs import TWINS
from transformers import TrainerCallback, TrainerState

from flora_lab.loading import load_config
from flora_lab.run.folder import Trial
from flora_lab.run.seeded import Seeded
from flora_lab.run.trial import run
from flora_lab.starter import starter

AUGMENT = ["task.data.augment=true"]
FLOAT32 = ["task.model.dtype=float32", "task.new_tokens=2"]
# with what is drawn at random; diffusion, with its pictures, is in test_task_text_to_image.py
TASKS = {
    "image_classification": [*AUGMENT, "task.data.size=16"],
    "text_classification": [],
    "semantic_segmentation": AUGMENT,
    "instance_segmentation": AUGMENT,
    "language": FLOAT32,
    "visual_instruction": [*FLOAT32, "task.model.load_in_4bit=false"],
    "oriented_detection": AUGMENT,
}
EVERY = [
    *(f"training.{key}" for key in ("epochs=2", "eval_steps=2", "warmup_steps=0", "mixed_precision='no'")),
    "methods.flora.options.dropout=0.2",
    "comparison.norms=3",
]


class Kill(TrainerCallback):
    """Copies the folder after the third step, to "step", and when only the last evaluations are missing, to "end"."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            shutil.copytree(self.folder, self.folder.with_name("step"))

    def on_train_end(self, args, state, control, **kwargs):
        shutil.copytree(self.folder, self.folder.with_name("end"))


def outcome(path, keys, folder):
    """A trial's row without its times, and the tensors of its files."""
    config = load_config(path, [*keys, f"output={folder}"])
    trial = Trial("flora", config.budget, 0, 0.001)
    row = json.loads(json.dumps(run(config, trial, None, folder / "trial")))
    own = ("job", "seconds", "train_seconds", "epoch_seconds", "memory")
    files = sorted((folder / "trial" / "trained").glob("*.safetensors"))
    tensors = {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    return {key: value for key, value in row.items() if key not in own}, tensors


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_training_ends_with_the_same_numbers(task, tmp_path, monkeypatch):
    (path := tmp_path / "job.yaml").write_text(starter(task))
    keys = [*TWINS[task](tmp_path, yaml.safe_load(starter(task))["task"]), *EVERY, *TASKS[task]]
    examples = len(load_config(path, keys).task.splits(0)["train"])
    batch = -(-examples // 4)
    steps = -(-examples // batch) + 1  # it ends within its second epoch
    keys += [f"training.batch_size={batch}", f"training.max_steps={steps}"]
    with monkeypatch.context() as patched:
        patched.setattr("flora_lab.run.trial.PushCheckpoints", lambda *_: Kill(tmp_path / "whole"))
        row, tensors = outcome(path, keys, tmp_path / "whole")
    assert row["steps"] == steps
    for killed, step in (("step", 2), ("end", steps)):
        assert (tmp_path / killed / "trial" / "checkpoints" / f"checkpoint-{step}" / "complete.json").exists()
        again, same = outcome(path, keys, tmp_path / killed)
        assert again == row
        assert same.keys() == tensors.keys() and all(torch.equal(same[name], tensors[name]) for name in same)


class Drawn:
    def __getitem__(self, index):
        return {"numbers": torch.rand(4)}


def test_random_changes_follow_from_seed_epoch_and_index():
    def numbers(seed, epoch, index):
        examples = Seeded(Drawn(), seed)
        examples.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        return tuple(examples[index]["numbers"].tolist())

    before = torch.get_rng_state()
    drawn = {key: numbers(*key) for key in product((0, 2**32 - 1), (0, 1), (0, 1))}
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn.values())) == 8
    assert drawn[0, 1, 0] == numbers(0, 1.75, 0)  # it goes on within the epoch
