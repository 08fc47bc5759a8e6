"""TRL's SFTTrainer, for examples that are tokens already and models that have their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments

if TYPE_CHECKING:
    from flora_lab.tasks.language import Language


def plain_head(model: nn.Module) -> bool:
    """Whether a product with its weight is all that the output layer does, as TRL's loss supposes.

    It is not if an adapter adds to the output, or if the weight is quantized.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and "forward" not in vars(head)


def supervised_trainer() -> type[Trainer]:
    """TRL's loss never holds the logits of a whole batch; its logs have the entropy and the accuracy of the tokens."""
    from trl import SFTTrainer

    return type("SupervisedTrainer", (_Supervised, SFTTrainer), {})


class _Supervised(Trainer):
    """Where we differ from SFTTrainer. An evaluation takes the model's own forward, since it needs the logits."""

    task: Language

    def __init__(self, model: nn.Module, args: TrainingArguments, *, train_dataset: Sequence[Any], **others: Any):
        from datasets import Dataset
        from trl import SFTConfig

        config = SFTConfig(
            **args.to_dict() | {"hub_token": args.hub_token},  # which a dictionary of them hides
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        config._n_gpu = args._n_gpu
        precise = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        columns = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        super().__init__(model, config, train_dataset=columns, processing_class=self.task.tokenizer, **others)
        self.train_dataset = train_dataset  # TRL accepts no other class of data than that of `columns`
        self.processing_class = None  # the task has its tokenizer's tokens; with one, Trainer changes the model's
        for parameter, data in precise:  # TRL rounds adapters of quantized models to bfloat16
            parameter.data = data

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            return Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        return super().compute_loss(model, inputs, False, num_items_in_batch)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for a checkpoint."""
