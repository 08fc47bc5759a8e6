"""Fine-tune a text classifier with transformers' Trainer, and save the adapter:

    python examples/text_classifier.py OUTPUT --model distilbert/distilbert-base-uncased

The sentences are made up, so that only the model is downloaded. Put your own into `sentences`.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from flora import FloraConfig


def sentences() -> list[tuple[str, int]]:
    """Texts and their classes: 1 for praise, 0 for the opposite."""
    praise, blame = ("a fine film", "well done", "I liked it"), ("a dull film", "badly done", "I left early")
    return [(text, label) for label, texts in enumerate((blame, praise)) for text in texts] * 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased")
    parser.add_argument("--budget", type=float, default=0.005, help="share of the model's parameters")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    config = FloraConfig(budget=given.budget, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def collate(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in rows])}

    arguments = TrainingArguments(
        given.output, learning_rate=1e-3, max_steps=given.steps, per_device_train_batch_size=8, warmup_steps=5,
        report_to="none", remove_unused_columns=False, save_strategy="no", logging_steps=10,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=sentences(), data_collator=collate).train()
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()
