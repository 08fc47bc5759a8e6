"""AdaLoRA of PEFT (Zhang et al. 2023), with what PEFT leaves to its user: the schedule, the allocation of ranks after
each step of transformers' Trainer, the regularisation, and going on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from flora.files import replace_file
from flora_lab.methods.budget import nearest_size, size_note
from flora_lab.methods.common import AdaptedModel, CannotAdapt, Limits, Request
from flora_lab.methods.with_peft import adapter_parameters, peft_model, peft_targets

LIMITS = Limits((nn.Linear, Conv1D, nn.Conv2d), ("groups", "padding_mode"))
STATE = "adalora.safetensors"
STATISTICS = ("exp_avg_ipt", "exp_avg_unc")


def adalora(
    request: Request,
    target_modules: Any = None,
    target_r: int | None = None,
    init_r: int | None = None,
    **options: Any,
) -> AdaptedModel:
    """The budget is for the final ranks; training starts with half as many again."""
    if "r" in options:
        raise ValueError("r: AdaLoRA has target_r in its place")
    if request.steps < 2:
        raise CannotAdapt(f"AdaLoRA needs at least two steps, and the training has {request.steps}")
    selection = request.select(LIMITS, target_modules)

    def config(target: int, initial: int) -> peft.AdaLoraConfig:
        fields = {"lora_alpha": 2 * initial, "fan_in_fan_out": selection.transposed, **schedule(request.steps)}
        return peft.AdaLoraConfig(
            target_r=target, init_r=initial, **fields | options, **peft_targets(request, selection)
        )

    def count(rank: int) -> int:
        return adapter_parameters(request, config(rank, rank))

    full = selection.full_rank()
    target = target_r or nearest_size(count, request.budget, full)
    parameters = count(target)
    initial = init_r or -(-3 * target // 2)
    if initial <= target:
        raise ValueError(f"init_r={initial}: expected more than target_r={target}, to which AdaLoRA reduces it")
    model = peft_model(request, config(target, initial), RegularisedModel)
    notes = [f"rank {initial}, cut to {size_note(target, full)} on average, on {selection}", *selection.notes]
    return AdaptedModel(model, notes, [Allocation(notes)], parameters=parameters)


def schedule(steps: int) -> dict[str, int]:
    """AdaLoRA's schedule for a training of ``steps``: an eighth before the first cut, the second half at the final
    ranks, close to the settings for GLUE in the original's appendix. The last cut needs a step before it."""
    last = min(steps // 2, steps - 2)
    return {"total_step": steps, "tinit": steps // 8, "tfinal": last, "deltaT": max(1, steps // 500)}


class RegularisedModel(PeftModel):
    """A PEFT model whose loss includes AdaLoRA's orthogonal regularisation, as PEFT defines it: the mean of |AAᵀ - I|
    and |BᵀB - I|. PEFT itself adds it only to models with a task type, and never to an output that is a mapping."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            weight = self.peft_config[self.active_adapter].orth_reg_weight
            outputs["loss"] = outputs["loss"] + weight * self._regularisation()
        return outputs

    def _regularisation(self) -> Tensor:
        norms = []
        for name, parameter in self.named_parameters():
            if "lora_A" in name or "lora_B" in name:  # (r, in), (out, r)
                gram = parameter @ parameter.mT if "lora_A" in name else parameter.mT @ parameter
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return torch.stack(norms).mean()


class Allocation(TrainerCallback):
    """Calls PEFT's rank allocator after each optimizer step, while the gradients exist.

    The allocator's state lies beside each of the Trainer's checkpoints, so that an interrupted training goes on
    unchanged. ``notes`` get one more note if the final ranks exceed the target.

    PEFT's config gets the rank pattern only at the end: with a pattern in the config, checkpoints would hold pruned
    tensors, which do not fit the model in training.
    """

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args, state, control, model, **kwargs):
        tuner, config = _tuner(model)
        if state.max_steps < config.total_step - config.tfinal:
            raise ValueError(
                f"AdaLoRA was set up for {config.total_step} steps and reaches its final ranks after "
                f"{config.total_step - config.tfinal}, but the training has {state.max_steps}"
            )
        if state.global_step:
            self._read(_file(args, state), tuner)

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        tuner, config = _tuner(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is None and "lora_" in name:
                parameter.grad = torch.zeros_like(parameter)  # an unused layer: PEFT needs a gradient there
        allocator, step, last = tuner.rankallocator, state.global_step + 1, config.total_step - config.tfinal
        if step < last and _finite(model):
            allocator.update_ipt(tuner.model)
        budget, due = allocator.budget_schedule(step)
        if step > last and self.pattern:
            allocator.mask_using_rank_pattern(tuner.model, self.pattern)
        elif (due or step == last) and allocator.exp_avg_ipt:
            self.pattern = allocator.mask_to_budget(tuner.model, budget)
        if step == last:
            allocator.reset_ipt()

    def on_save(self, args, state, control, model, **kwargs):
        if state.is_world_process_zero:
            self._write(_file(args, state), _tuner(model)[0])

    def on_train_end(self, args, state, control, model, **kwargs):
        tuner, config = _tuner(model)
        config.rank_pattern = self.pattern
        before, target = tuner.rankallocator.init_bgt, tuner.rankallocator.target_bgt
        kept = sum(map(sum, self.pattern.values())) if self.pattern else before
        if kept > target:
            self.notes.append(
                f"{kept} of {before} ranks remain, above the budget of {target}: gradients were not finite"
            )

    def _write(self, file: Path, tuner: Any) -> None:
        tensors = {
            f"{kind}/{name}": tensor.contiguous()
            for kind in STATISTICS
            for name, tensor in getattr(tuner.rankallocator, kind).items()
        }
        with replace_file(file) as temporary:
            save_file(tensors, temporary, metadata={"rank_pattern": json.dumps(self.pattern)})

    def _read(self, file: Path, tuner: Any) -> None:
        devices = {name: parameter.device for name, parameter in tuner.model.named_parameters()}
        with safe_open(file, framework="pt") as tensors:
            self.pattern = json.loads(tensors.metadata()["rank_pattern"])
            for key in tensors.keys():
                kind, name = key.split("/", 1)
                getattr(tuner.rankallocator, kind)[name] = tensors.get_tensor(key).to(devices[name])
                tuner.rankallocator.ipt[name] = torch.zeros_like(getattr(tuner.rankallocator, kind)[name])


def _tuner(model: PeftModel) -> tuple[Any, Any]:
    return model.base_model, model.peft_config[model.active_adapter]


def _finite(model: nn.Module) -> bool:
    """Whether all gradients are finite. In a step that fp16's scaler skips they are not; they would stay in the moving
    averages of importance for good, and no rank would be cut."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", STATE)
