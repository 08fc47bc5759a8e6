"""Causal language models, fine-tuned on conversations, prompts with answers, or texts (supervised fine-tuning).

TRL's SFTTrainer takes the steps, unless the output layer is adapted. TRL also packs the examples and collates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.lines import counted
from flora_lab.tasks.data.chats import Chats, formed
from flora_lab.tasks.data.records import Records, three
from flora_lab.tasks.data.tokens import IGNORED, answer_labels, prompts
from flora_lab.tasks.evaluation import lm_eval
from flora_lab.tasks.evaluation.answers import ANSWERS, need
from flora_lab.tasks.evaluation.forgetting import Passages, forgotten
from flora_lab.tasks.evaluation.generation import EVALUATED, TOKENS, Answering
from flora_lab.tasks.models.language_model import LanguageModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

LONGER = ("refuse", "leave_out", "cut")
LM_EVAL_BATCH = 8


@dataclass
class Texts(Chats):
    """How a row becomes tokens."""

    prompt: str | None = field(
        default=None, metadata={"help": "template, in place of the column: columns in braces, such as {question}"}
    )
    completion: str | None = field(default=None, metadata={"help": "likewise, of the answer"})
    answers_only: bool = field(default=True, metadata={"help": "the loss is of the answers; false: of prompts too"})
    max_length: int | None = field(default=None, metadata={"help": "tokens per example, at most", "least": 2})
    max_characters: int | None = field(default=None, metadata={"help": "leave out longer rows of train", "least": 1})
    longer: str = field(default="refuse", metadata={"help": "what to do beyond max_length", "choices": LONGER})
    packing: bool = field(default=False, metadata={"help": "several examples of train in max_length tokens"})

    def __post_init__(self):
        super().__post_init__()
        if self.packing and not self.max_length:
            raise ValueError("task.data.packing=true: expected task.data.max_length, the tokens of a packed example")


@dataclass
class Language(Answering):
    name: str = field(default="language", metadata={"help": "the task"})
    model: LanguageModel = field(default_factory=LanguageModel)
    data: Texts = field(default_factory=Texts)
    source: Texts | None = field(default=None, metadata={"help": "data that the base model is trained on first"})
    evaluate: str = field(
        default=TOKENS,
        metadata={"help": EVALUATED, "choices": (TOKENS, *ANSWERS)},
    )
    new_tokens: int = field(default=256, metadata={"help": "the most to generate for an answer", "least": 1})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file, for a tokenizer without one", "path": True}
    )

    lm_eval: list[str] = field(
        default_factory=list, metadata={"help": "tasks of lm-eval, such as arc_easy, to test on after training"}
    )
    lm_eval_batch: int | None = field(
        default=None, metadata={"help": f"requests at a time to lm-eval; default: {LM_EVAL_BATCH}", "least": 1}
    )
    forgetting: Passages | None = field(
        default=None, metadata={"help": "other texts, to measure how much their loss rises"}
    )

    targets = "all-linear"
    judging = ("forgetting", "lm_eval_batch")

    def source_task(self) -> Language | None:
        return self.source and replace(self, data=self.source, source=None)

    # ------------------------------------------------------------------------------------------------------- the data

    def splits(self, seed: int) -> dict[str, Tokens]:
        """Packed examples are packed after the split, and have no names of their own."""
        keys = self.data
        splits = three(self._records, keys, seed, keys.path)
        evaluated = ("input_ids", "labels") if self.evaluate == TOKENS else ("prompt", "answer")
        made = {split: Tokens(records, evaluated) for split, records in splits.items()}
        made["train"] = Tokens(splits["train"], ("input_ids", "labels"))
        if keys.packing:
            from trl import pack_dataset

            rows = splits["train"].dataset.select_columns(["input_ids", "labels"]).flatten_indices(keep_in_memory=True)
            packed = pack_dataset(rows, keys.max_length, map_kwargs={"keep_in_memory": True})
            made["train"] = Tokens(Records(packed, lambda index: f"packed row {index}"), tuple(packed.column_names))
        return made

    def check(self, splits: dict[str, Tokens]) -> None:
        """Every example was tokenized, and so checked, when it was read: see whether the model knows every token."""
        lm_eval.check(self.lm_eval)
        if self.forgetting:
            self.forgetting.read(self.tokenizer, self.model.positions)
        known, size = self.model.config_of_text.vocab_size, len(self.tokenizer)
        for tokens in splits.values():
            for index in range(len(tokens)) if size > known else ():
                if (largest := max(max(tokens[index][column]) for column in tokens.columns)) >= known:
                    excess = f"token {largest} of the tokenizer's {size}; the model has {known} only"
                    raise ValueError(f"{tokens.records.name(index)}: {excess}")

    @cached_property
    def _records(self) -> dict[str, Records]:
        """Rows as tokens: "input_ids", "labels", and "prompt" and "answer", for the last answer."""
        self.load()
        return {split: self._tokenized(records, split == "train") for split, records in self.data.read().items()}

    def _tokenized(self, records: Records, train: bool) -> Records:
        """Raises ValueError naming the row that can't be learned from."""
        import datasets

        kept: list[int] = []

        def examples(rows: dict[str, list[int]]) -> dict[str, list]:
            columns: dict[str, list] = {name: [] for name in features}
            for index, _ in zip(rows["index"], passed, strict=False):
                try:
                    example = self._example(records[index], train)
                except ValueError as error:
                    raise ValueError(f"{records.name(index)}: {error}") from error
                if example:
                    kept.append(index)
                    for name, value in example.items():
                        columns[name].append(value)
            return columns

        names = ("input_ids", "labels", "prompt", "answer")
        features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in names})
        rows = datasets.Dataset.from_dict({"index": range(len(records))})
        keys = {"batched": True, "remove_columns": ["index"], "keep_in_memory": True, "new_fingerprint": "tokens"}
        with closing(counted(range(len(records)), len(records), "reading")) as passed:
            rows = rows.map(examples, features=features, **keys)
        return Records(rows, lambda index: records.name(kept[index]))

    def _example(self, row: Any, train: bool) -> dict[str, list[int]] | None:
        """A row's tokens; None if it is to be left out. Raises ValueError if it can't be learned from."""
        keys, generated = self.data, self.evaluate != TOKENS and not train
        row = formed(keys.renamed(row), keys.prompt, keys.completion)
        if train and keys.max_characters and len(characters(row)) > keys.max_characters:
            return None
        ids, labels, prompt, answer = self._ids(row)
        if generated and not prompt:
            raise ValueError(f"a text has no prompt; expected task.evaluate={TOKENS}")
        if generated:
            need(self.evaluate, characters(row, answer=True))
        most, longest = keys.max_length, self.model.positions
        if most and len(ids) > most and not generated:
            if keys.longer == "refuse":
                raise ValueError(f"{len(ids)} tokens, above task.data.max_length={most}; set task.data.longer")
            if keys.longer == "leave_out":
                return None
            ids, labels = ids[:most], labels[:most]
            if all(label == IGNORED for label in labels):
                raise ValueError(f"no token of an answer within task.data.max_length={most}")
        size = len(prompt) + 1 if generated else len(ids)
        if longest and size > longest:
            limit = f"the model has {longest} positions (max_position_embeddings)"
            raise ValueError(f"{size} tokens, and {limit}; set task.data.max_length and task.data.longer")
        return {"input_ids": ids, "labels": labels, "prompt": prompt, "answer": answer}

    def _ids(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, labels, and the tokens of the last prompt and its answer; of a text, no prompt and no answer."""
        if "messages" in row:
            ids, labels, prompt = self._conversation(row["messages"])
        else:
            text = row.get("text") or row["prompt"] + row["completion"]
            ids = [*self._plain(text), self.tokenizer.eos_token_id]
            prompt = self._plain(row["prompt"]) if "prompt" in row else []
            labels = answer_labels(ids, [(prompt, ids)])
        answer = characters(row, answer=True)
        spoken = self.tokenizer(answer, add_special_tokens=False)["input_ids"] if prompt else []
        return ids, labels if self.data.answers_only else ids, prompt, spoken

    def _plain(self, text: str) -> list[int]:
        """With the token that starts a text, if the tokenizer has one, and without the one that ends it."""
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _conversation(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int], list[int]]:
        """Tokens, labels, and the tokens up to the last answer."""

        def rendered(count: int, start: bool = False) -> list[int]:
            keys = {"tokenize": True, "return_dict": True, "add_generation_prompt": start}
            return self.templated(self.tokenizer, messages[:count], **keys)["input_ids"]

        if not self.tokenizer.chat_template:
            remedy = "set task.chat_template, or give prompt and completion in place of messages"
            raise ValueError(f"{self.model.reader} has no chat template; {remedy}")
        ids = rendered(len(messages))
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [(rendered(number, True), rendered(number + 1)) for number in turns]
        return ids, answer_labels(ids, spans), spans[-1][0]

    @cached_property
    def tokenizer(self) -> Any:
        return self.with_template(self.model.load_tokenizer())

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Prompts are padded on the left, to generate on their right; packed examples are one long row."""
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        if "prompt" in examples[0]:
            return prompts(self.tokenizer, examples)
        pack = "seq_lengths" in examples[0]
        return DataCollatorForLanguageModeling(self.tokenizer.pad_token_id, padding_free=pack)(list(examples))

    # ------------------------------------------------------------------------------------- the model, and how it does

    def build(self) -> nn.Module:
        return self.model.build("AutoModelForCausalLM")

    def trainer(self, model: nn.Module) -> type[Trainer]:
        from flora_lab.tasks.models.supervised import plain_head, supervised_trainer

        return supervised_trainer() if plain_head(model) else super().trainer(model)

    def judge(self, model: nn.Module, base: Any, splits: Any, folder: Path) -> dict[str, Any]:
        numbers = lm_eval.evaluate(model, self.tokenizer, self.lm_eval, self.lm_eval_batch or LM_EVAL_BATCH)
        if self.forgetting:
            numbers |= forgotten(model, base, self.forgetting.read(self.tokenizer, self.model.positions))
        return {"test": numbers}


@dataclass
class Tokens:
    """Some columns of tokenized rows."""

    records: Records
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.records[index]
        return {column: row[column] for column in self.columns}


def characters(row: dict[str, Any], answer: bool = False) -> str:
    """The text of a row in one of TRL's forms; ``answer``: of its last answer alone."""
    if "messages" in row:
        return " ".join(message["content"] for message in row["messages"][-1 if answer else 0 :])
    parts = (row.get("prompt"), row.get("completion"), row.get("text"))
    return row.get("completion", "") if answer else " ".join(filter(None, parts))
