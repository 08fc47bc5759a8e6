"""Visual instruction tuning (Liu et al. 2023, LLaVA): any image-text model, on conversations about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_lab.lines import counted
from flora_lab.tasks.data.dialogues import Dialogue, Dialogues, dialogue, spread
from flora_lab.tasks.data.records import Records, check_each, three
from flora_lab.tasks.data.tokens import IGNORED, answer_labels
from flora_lab.tasks.evaluation import lmms_eval
from flora_lab.tasks.evaluation.answers import ANSWERS, need
from flora_lab.tasks.evaluation.generation import EVALUATED, TOKENS, Answering
from flora_lab.tasks.models.image_text import ImageTextModel
from flora_lab.tasks.models.language_model import in_float32
from flora_lab.tasks.models.pretrained import brief

if TYPE_CHECKING:
    from torch import nn


@dataclass
class VisualInstruction(Answering):
    name: str = field(default="visual_instruction", metadata={"help": "the task"})
    model: ImageTextModel = field(default_factory=ImageTextModel)
    data: Dialogues = field(default_factory=Dialogues)
    source: Dialogues | None = field(default=None, metadata={"help": "data that the base model is trained on first"})
    parts: list[str] = field(
        default_factory=lambda: ["language_model"],
        metadata={"help": "whose linear layers to adapt: language_model, vision_tower, multi_modal_projector, …"},
    )
    trained: list[str] = field(
        default_factory=list,
        metadata={"help": "parts that every method trains in full, in float32, such as the projector"},
    )
    evaluate: str = field(default="text", metadata={"help": EVALUATED, "choices": (TOKENS, *ANSWERS)})
    new_tokens: int = field(default=64, metadata={"help": "the most to generate for an answer", "least": 1})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file, for a processor without one", "path": True}
    )
    lmms_eval: list[str] = field(
        default_factory=list, metadata={"help": "tasks of lmms-eval, such as pope, to test on after training"}
    )
    lmms_model: str = field(default="llava_hf", metadata={"help": "lmms-eval's name of the model's class"})

    def source_task(self) -> VisualInstruction | None:
        return self.source and replace(self, data=self.source, source=None)

    # ------------------------------------------------------------------------------------------------------- the data

    def splits(self, seed: int) -> dict[str, Rows]:
        splits = three(self._records, self.data, seed, self.data.path)
        return {
            name: Rows(records, self, name != "train" and self.evaluate != TOKENS) for name, records in splits.items()
        }

    @cached_property
    def _records(self) -> dict[str, Records]:
        self.load()
        return self.data.read()

    def check(self, splits: dict[str, Rows]) -> None:
        """Build every example, open every picture, and count the tokens that both become.

        How many tokens a processor makes of pictures depends on their sizes alone: one row of each is passed to it.
        """
        lmms_eval.check(self.lmms_eval)
        seen: list[tuple[int, Rows, int, int, tuple[tuple[int, int], ...]]] = []

        def look(rows: Rows, index: int) -> None:
            example = rows[index]
            sizes = tuple(picture.size for picture in example["images"])
            seen.append((rows.place(index), rows, index, len(example["ids"]), sizes))  # thread-safe

        check_each(splits.values(), look)
        more: dict[tuple[tuple[int, int], ...], int] = {}  # tokens than in the text, by the pictures' sizes
        for _, rows, index, length, sizes in counted(sorted(seen, key=itemgetter(0)), len(seen), "measuring"):
            name = rows.records.name(index)
            if sizes not in more:
                try:
                    more[sizes] = self.collate([rows[index]])["input_ids"].shape[1] - length
                except Exception as error:  # a processor's own code may raise anything
                    raise ValueError(f"{name}: its processor refuses it: {brief(error)}") from error
            self._need_room(name, length + more[sizes] + rows.generated)

    def _need_room(self, name: str, tokens: int) -> None:
        """Raises ValueError naming the row. ``tokens``: of an example, or of a prompt and the first of an answer."""
        positions, longest = self.model.positions, self.data.max_length
        if longest and tokens > longest:
            raise ValueError(f"{name}: {tokens} tokens with its pictures; task.data.max_length={longest}")
        if positions and tokens > positions:
            limit = f"the model has {positions} positions (max_position_embeddings)"
            raise ValueError(f"{name}: {tokens} tokens with its pictures; {limit}")

    @cached_property
    def processor(self) -> Any:
        processor = self.with_template(self.model.load_processor())
        if not processor.chat_template:
            raise ValueError(f"{self.model.reader} has no chat template; set task.chat_template")
        return processor

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def _tokens(self) -> list[str]:
        """How the model spells a picture and the like."""
        given = (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        return [token for token in given if token]

    def example(self, row: Any, generated: bool) -> dict[str, Any]:
        """ "text" up to its end, or up to the last answer; its "ids", with one token a picture; "labels" or "answer";
        and "dialogue". Raises ValueError if the row can't be learned from."""
        row = self.data.renamed(row)
        talk = dialogue(row, self.data, self._tokens)
        turns = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if generated:
            answer = self._answer(row, talk)
            need(self.evaluate, answer)
            text = self._rendered(talk, turns[-1], True)
            return {"text": text, "ids": self._ids(text), "answer": answer, "dialogue": talk}
        text = self._rendered(talk, len(talk.messages))
        ids = self._ids(text)
        spans = [(self._rendered(talk, number, True), self._rendered(talk, number + 1)) for number in turns]
        labels = answer_labels(ids, [(self._ids(before), self._ids(after)) for before, after in spans])
        return {"text": text, "ids": ids, "labels": labels, "dialogue": talk}

    def _answer(self, row: dict[str, Any], talk: Dialogue) -> str:
        """The last one, or people's answers, line by line."""
        people = row.get(self.data.answers) if self.evaluate == "vqa" else None
        if not people:
            return talk.answer
        said = (
            [one.get("answer") if isinstance(one, dict) else one for one in people] if isinstance(people, list) else []
        )
        if not said or not all(isinstance(one, str) for one in said):
            raise ValueError(f"column {self.data.answers!r} is {people!r:.80}; expected a list of texts")
        return "\n".join(said)

    def _rendered(self, talk: Dialogue, count: int, start: bool = False) -> str:
        return self.templated(self.processor, talk.messages[:count], add_generation_prompt=start)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self._opened(text))["input_ids"]

    def _opened(self, text: str) -> bool:
        """Whether the tokenizer must add the token that starts a text, since the template does not."""
        start = self.tokenizer.bos_token
        return bool(start) and not text.startswith(start)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Prompts are padded on the left, to generate on their right."""
        import torch

        generated = "answer" in examples[0]
        pictures = [example["images"] for example in examples]
        batch = dict(
            self.processor(
                images=pictures if any(pictures) else None,
                text=[example["text"] for example in examples],
                padding=True,
                padding_side="left" if generated else "right",
                add_special_tokens=self._opened(examples[0]["text"]),
                return_tensors="pt",
            )
        )
        if generated:
            labels = [self.tokenizer(example["answer"], add_special_tokens=False)["input_ids"] for example in examples]
        else:
            rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
            seen = [ids[mask].tolist() for ids, mask in rows]
            token = self.tokenizer.convert_tokens_to_ids(self.processor.image_token)
            labels = [spread(one["ids"], one["labels"], ids, token) for one, ids in zip(examples, seen, strict=True)]
        padded = [torch.tensor(row) for row in labels]
        return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=IGNORED)}

    # ------------------------------------------------------------------------------------------------------ the model

    def build(self) -> nn.Module:
        model = self.model.build("AutoModelForImageTextToText", self.trained)
        for name in self.head(model):
            in_float32(model.get_submodule(name))
        return model

    def head(self, model: nn.Module) -> list[str]:
        return [name for part in self.trained for name in self._named(model, part, "trained")[:1]]

    def targets_of(self, model: nn.Module) -> list[str]:
        """The linear layers of `parts`, but for those that are trained in full."""
        from torch.nn import Linear

        parts = tuple(f"{name}." for part in self.parts for name in self._named(model, part, "parts"))
        full = tuple(f"{name}." for name in self.head(model))
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, Linear) and f"{name}.".startswith(parts) and not (full and name.startswith(full))
        ]

    def _named(self, model: nn.Module, part: str, key: str) -> list[str]:
        """The full names of the modules of that name. Raises ValueError naming the task's ``key`` if there are none."""
        names = [name for name, _ in model.named_modules() if name == part or name.endswith(f".{part}")]
        if not names:
            known = [name for name, module in model.named_modules() if name.count(".") == 1 and list(module.children())]
            raise ValueError(f"task.{key}={getattr(self, key)}: the model has no part {part!r}, but {', '.join(known)}")
        return names

    def judge(self, model: nn.Module, base: Any, splits: Any, folder: Path) -> dict[str, Any]:
        """lmms-eval's numbers of the merged model: merged as `flora merge` does, never into 4 bits."""
        from peft import PeftModel

        notes = []
        if self.lmms_eval and (lost := lmms_eval.lost(model)):
            without = f"its {len(lost)} parameters such as {lost[0]}"
            return {"notes": [f"lmms-eval was not run: it would load the model without {without}"]}
        if self.lmms_eval and self.model.load_in_4bit and isinstance(model, PeftModel):
            model.cpu()  # one model at a time fits where training did
            dense = replace(self, model=replace(self.model, load_in_4bit=False)).build()
            model = PeftModel.from_pretrained(dense, folder / "trained")
            notes = [f"lmms-eval measured the adapter merged into the base model in {self.model.dtype}, not in 4 bits"]
        numbers = lmms_eval.evaluate(model, self.processor, self.lmms_eval, self.lmms_model)
        return {"test": numbers, "notes": notes}


@dataclass
class Rows:
    """Examples that are made when they are asked for, since pictures are large."""

    records: Records
    task: VisualInstruction
    generated: bool

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> int:
        return self.records.place(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.records.name(index)
        try:
            row = self.records[index]
        except Exception as error:  # of Pillow's: a data set of the hub decodes its pictures itself
            raise ValueError(f"{name}: {brief(error)}") from error
        try:
            example = self.task.example(row, self.generated)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        talk = example.pop("dialogue")
        return {**example, "images": talk.pictures(name, self.task.data.image)}
