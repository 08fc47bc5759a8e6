"""What a diffusion task adds to a training: the moving average of the trained weights, and pictures of each epoch."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from flora.files import replace_file
from flora_lab.tasks.diffusion.samples import Samples, plain, write


class Averaging(TrainerCallback):
    """Keeps diffusers' `EMAModel` of the trained weights; it is what is evaluated and, in the end, what stays.

    Its state lies beside each of the Trainer's checkpoints, so that an interrupted training goes on unchanged.
    """

    FILE = "average.safetensors"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.swapped = False

    def on_train_begin(self, args, state, control, model, **kwargs):
        from diffusers.training_utils import EMAModel

        self.average = EMAModel(_trained(model).values(), decay=self.decay)
        if state.global_step:
            with safe_open(self._file(args, state), framework="pt") as tensors:
                self.average.optimization_step = int(tensors.metadata()["steps"])
                saved = [tensors.get_tensor(name) for name in _trained(model)]
            for shadow, tensor in zip(self.average.shadow_params, saved, strict=True):
                shadow.copy_(tensor)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.average.step(_trained(model).values())
        self._swap_if_evaluated(control, model)

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self._swap_if_evaluated(control, model)

    def _swap_if_evaluated(self, control, model: nn.Module) -> None:
        """An evaluation comes next if the Trainer's own callback, which runs before all others, has asked for it."""
        if control.should_evaluate:
            self.average.store(_trained(model).values())
            self.average.copy_to(_trained(model).values())
            self.swapped = True

    def on_evaluate(self, args, state, control, model, **kwargs):
        """The checkpoint comes next."""
        if self.swapped:
            self.average.restore(_trained(model).values())
            self.swapped = False

    def on_save(self, args, state, control, model, **kwargs):
        if state.is_world_process_zero:
            names = _trained(model)
            tensors = {
                name: shadow.contiguous() for name, shadow in zip(names, self.average.shadow_params, strict=True)
            }
            with replace_file(self._file(args, state)) as file:
                save_file(tensors, file, {"steps": str(self.average.optimization_step)})

    def on_train_end(self, args, state, control, model, **kwargs):
        self.average.copy_to(_trained(model).values())

    def _file(self, args, state) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", self.FILE)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class SampleEpochs(TrainerCallback):
    """Leaves pictures in FOLDER/epoch-N at the first evaluation after the end of epoch N."""

    def __init__(self, keys: Samples, folder: Path):
        self.keys, self.folder = keys, folder

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown = math.floor(state.epoch or 0)

    def on_evaluate(self, args, state, control, model, **kwargs):
        epoch = math.floor(state.epoch)
        if epoch > self.shown and state.is_world_process_zero:
            prompts, seeds = self.keys.pairs(self.keys.prompts)
            made = plain(model).sample(prompts, seeds, self.keys)
            write(made, prompts, seeds, self.folder / f"epoch-{epoch}")
        self.shown = epoch
