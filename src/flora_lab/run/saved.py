"""What a trial saves of its model, and how exactly the model comes back from it."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import peft
import torch
from torch import nn

from flora.files import save_tensors
from flora.layers.weights.storage import dense_of, pack
from flora_lab.methods.common import is_quantized
from flora_lab.run.fit import load_statistics, statistics
from flora_lab.tasks import Examples, Task

WEIGHTS, STATISTICS = "model.safetensors", "statistics.safetensors"
COMPARED = 8  # examples whose outputs are compared


def save(model: nn.Module, folder: Path, about: str = "") -> int:
    """Save the trained weights and nothing else, completely or not at all. Returns their size in bytes.

    ``about``: what an adapter's model card says of the training, in Markdown.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if isinstance(model, peft.PeftModel):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape")  # AdaLoRA's that were cut to rank 0
            if about:
                part.mkdir(parents=True)
                Path(part, "README.md").write_text(about)
            model.save_pretrained(part)
        if moved := statistics(model):
            save_tensors(part / STATISTICS, moved)
    else:
        part.mkdir(parents=True)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        kept = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}  # ties once
        kept |= {name: tensor for name, tensor in model.state_dict().items() if name not in names}
        save_tensors(part / WEIGHTS, {name: tensor.detach().contiguous() for name, tensor in kept.items()})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def in_standard_order(model: nn.Module) -> None:
    """Put 4-bit weights back into the order that bitsandbytes quantized them in.

    On CPUs with AVX-512 for bfloat16 its first evaluation puts them into another. PEFT merges its own adapters as if it
    had not, and the merged weights are noise (seen with bitsandbytes 0.50 and PEFT 0.21).
    """
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            pack(module, "weight", dense_of(module, "weight"))


@torch.no_grad()
def round_trip(
    task: Task, trained: peft.PeftModel, base: nn.Module, folder: Path, examples: Examples
) -> dict[str, float]:
    """The largest differences of an output: loaded onto ``base`` against trained, and merged against loaded.

    The latter is missing where the method can't merge into quantized weights: some of PEFT's only train beside them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)  # AdaLoRA's own names
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`", UserWarning)  # rounded as in training
        loaded = peft.PeftModel.from_pretrained(base, folder)
    if (folder / STATISTICS).exists():
        load_statistics(loaded, folder / STATISTICS)
    few = [[examples[index]] for index in range(min(COMPARED, len(examples)))]  # one by one: outputs may be large

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        return [task.outputs(model.eval(), one).float().cpu() for one in few]

    def largest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        return max((one - other).abs().max().item() for one, other in zip(some, others, strict=True))

    from_disk, quantized = outputs(loaded), is_quantized(base)
    differences = {"loaded_difference": largest(outputs(trained), from_disk)}
    with warnings.catch_warnings():  # that a quantized weight is rounded anew; the difference says by how much
        warnings.filterwarnings("ignore", "Merge .* module to|merging has quantized", UserWarning)
        in_standard_order(loaded)
        try:
            merged = loaded.merge_and_unload()
        except Exception:  # of PEFT's
            if not quantized:
                raise
            return differences
    return {**differences, "merged_difference": largest(outputs(merged), from_disk)}
