"""Fine-tune a small language model with FLoRA in as many processes as there are:

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train.py OUTPUT

The folder OUTPUT gets the adapter. The model is random and its data are counted numbers, so nothing is downloaded.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from flora import FloraConfig


def main(output: str) -> None:
    """Train for a few steps, and save the adapter."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model = get_peft_model(base, FloraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    batches = DataLoader([(torch.arange(8) + n) % 64 for n in range(64)], batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for epoch in range(3):
        for tokens in batches:
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"epoch {epoch}, {accelerator.num_processes} processes: loss {mean:.4f}")
    state = accelerator.get_state_dict(model)  # of all processes together
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output, state_dict=state)


if __name__ == "__main__":
    main(sys.argv[1])
