"""QLoRA with FLoRA: a language model in 4 bits, with an adapter in higher precision beside it:

    python examples/qlora.py OUTPUT --model HuggingFaceTB/SmolLM2-135M

Needs `pip install bitsandbytes`. It trains on one made-up text; put your own into `texts`.
"""

import argparse

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from flora import FloraConfig


def texts() -> list[str]:
    """What the model learns to say."""
    return ["The core is small, and the weight is large."] * 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    bf16 = torch.cuda.is_available()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=four_bits)
    base = prepare_model_for_kbit_training(base)
    model = get_peft_model(base, FloraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    def collate(rows: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(rows, return_tensors="pt")["input_ids"]
        return {"input_ids": tokens, "labels": tokens}

    arguments = TrainingArguments(
        given.output, learning_rate=1e-3, max_steps=given.steps, per_device_train_batch_size=4, bf16=bf16,
        report_to="none", remove_unused_columns=False, save_strategy="no", logging_steps=10,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=texts(), data_collator=collate).train()
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()
