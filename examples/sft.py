"""Teach a language model to answer, with TRL's SFTTrainer:

    python examples/sft.py OUTPUT --model HuggingFaceTB/SmolLM2-135M-Instruct

Needs `pip install trl`. The questions are made up, so that only the model is downloaded. Put your own into `questions`.
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from flora import FloraConfig


def questions() -> list[dict]:
    """Prompts and their answers, each as messages. The loss counts the answers alone."""
    pairs = [("Is the core large?", "The core is small."), ("Is the weight small?", "The weight is large.")]
    return [
        {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in pairs * 16
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--budget", type=float, default=0.005, help="share of the model's parameters")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()

    arguments = SFTConfig(
        given.output, learning_rate=1e-3, max_steps=given.steps, per_device_train_batch_size=4, warmup_steps=5,
        bf16=torch.cuda.is_available(), report_to="none", save_strategy="no", logging_steps=10,
    )  # fmt: skip
    config = FloraConfig(budget=given.budget, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(given.model, arguments, train_dataset=Dataset.from_list(questions()), peft_config=config)
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
