"""LoRA and FLoRA on one model, each with layers of its own, by PEFT's PeftMixedModel:

    python examples/mixed.py BASE LORA_FOLDER

An existing LoRA stays as it is, and FLoRA learns something new beside it. PEFT can't save a mixed model: the adapters'
own tensors are saved here.
"""

import sys

import torch
from peft import PeftMixedModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from flora import FloraConfig


def main(base: str, lora: str, output: str = "flora.safetensors") -> None:
    """A few steps of FLoRA beside a frozen LoRA."""
    model = PeftMixedModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora, adapter_name="lora")
    model.add_adapter("flora", FloraConfig(r=4, target_modules=["up_proj", "down_proj"]))
    model.set_adapter(["lora", "flora"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "tucker_" in name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.arange(8)[None]
    for step in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    save_file(get_peft_model_state_dict(model, adapter_name="flora"), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
