"""Language: what is read and refused, which tokens are learned, how answers are judged, and that it trains."""

import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from click.testing import CliRunner
from transformers import BitsAndBytesConfig, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from trl import SFTTrainer

from flora.cli import main
from flora.layers.weights.storage import dense_of
from flora_lab.methods import METHODS, CannotAdapt, adapt
from flora_lab.run.fit import first_steps, fit
from flora_lab.run.saved import in_standard_order
from flora_lab.settings import Training
from flora_lab.tasks import Task
from flora_lab.tasks.data.arithmetic import problems
from flora_lab.tasks.data.tokens import IGNORED
from flora_lab.tasks.evaluation.answers import ANSWERS, accuracy
from flora_lab.tasks.evaluation.forgetting import Passages
from flora_lab.tasks.evaluation.generation import token_accuracy, top_tokens
from flora_lab.tasks.language import Language, Texts
from flora_lab.tasks.models.language_model import LanguageModel

CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
TEMPLATE = """\
{%- for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
SHAREGPT = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def sums(count=24, start=0):
    return [{"question": f"{n} + 1?", "answer": f"The answer is: {n + 1}"} for n in range(start, start + count)]


def tiny_model(folder, template=TEMPLATE, **sizes):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = {**{key: value for key, value in CONFIG.items() if key != "model_type"}, **sizes}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


def tiny_keys(folder, path):
    """Overrides with which a language YAML runs on next to nothing; ``test_train`` uses them too."""
    size = [f"task.model.config.{key}={value}" for key, value in CONFIG.items() if key.endswith(("layers", "size"))]
    short = ["training.batch_size=4", "training.eval_batch_size=4", "task.new_tokens=2", "budget=500"]
    if path.stem == "arithmetic":
        counts = [
            f"task.{part}.{split}_examples=8"
            for part in ("data", "source")
            for split in ("train", "validation", "test")
        ]
        return [*size, *counts, *short, "pretraining.batch_size=4"]
    rows = {
        "metamathqa": [{"query": row["question"], "response": row["answer"]} for row in sums()],
        "commonsense-170k": [
            {"instruction": f"Is {n} even?", "input": "", "output": f"the correct answer is {str(n % 2 == 0).lower()}"}
            for n in range(24)
        ],
    }[path.stem]
    data = lines(folder / "data" / "train.jsonl", rows)
    other = [f"task.forgetting={{path: {data}, column: query, characters: 5}}"] if path.stem == "metamathqa" else []
    lines(folder / "test" / "test.jsonl", sums(8) if path.stem == "metamathqa" else rows[:8])
    return [
        f"task.model.name={tiny_model(folder / 'model', max_position_embeddings=256)}",
        "task.model.dtype=float32",
        "task.data.max_length=120",
        f"task.data.path={folder / 'data'}",
        f"task.data.test_path={folder / 'test'}",
        "task.data.test_subset=null",
        *other,
        "task.lm_eval=[]",
        "training.gradient_checkpointing=false",
        "training.mixed_precision='no'",
        "training.eval_steps=null",
        *short,
    ]  # fmt: skip


def task(path, evaluate="tokens", model=None, **data):
    model = LanguageModel(name=str(model)) if model else LanguageModel(config=dict(CONFIG))
    return Language(model=model, data=Texts(path=str(path), **data), evaluate=evaluate, new_tokens=4)


def text(job, ids):
    return "".join(job.tokenizer.decode([one]) if one != IGNORED else "_" for one in ids)


# -------------------------------------------------------------------------------------------------------------- data

PAIR = {"prompt": "1 + 1?\n", "completion": "two"}
FORMS = {
    "prompt and completion": (PAIR, "1 + 1?\ntwo</s>", "_______two</s>"),
    "text": ({"text": "one, two"}, "one, two</s>", "one, two</s>"),
    "messages": (
        {"messages": CHAT[:3]},
        "<system>Be short.</system><user>One?</user><assistant>1</assistant>",
        "_" * 54 + "1</assistant>",
    ),
    "two answers": (
        {"messages": CHAT[1:]},
        "<user>One?</user><assistant>1</assistant><user>Two?</user><assistant>2</assistant>",
        "_" * 28 + "1</assistant>" + "_" * 28 + "2</assistant>",
    ),
    "conversations": (
        {"conversations": SHAREGPT},
        "<user>One?</user><assistant>1</assistant>",
        "_" * 28 + "1</assistant>",
    ),
    "parts of text": (
        {
            "messages": [
                {**CHAT[1], "content": [{"type": "text", "text": "On"}, {"type": "text", "text": "e?"}]},
                CHAT[2],
            ]
        },
        "<user>One?</user><assistant>1</assistant>",
        "_" * 28 + "1</assistant>",
    ),
    "a prompt of messages": (
        {"prompt": CHAT[1:2], "completion": CHAT[2:3]},
        "<user>One?</user><assistant>1</assistant>",
        "_" * 28 + "1</assistant>",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_becomes_tokens_and_the_loss_counts_its_answers(form, tmp_path):
    row, whole, learned = FORMS[form]
    file = lines(tmp_path / "rows.jsonl", [row] * 12)
    for answers_only, labels in ((True, learned), (False, whole)):
        job = task(file, model=tiny_model(tmp_path / "model"), answers_only=answers_only)
        example = job.splits(0)["train"][0]
        assert text(job, example["input_ids"]) == whole and text(job, example["labels"]) == labels


def test_templates_and_renamed_columns_make_the_prompt(tmp_path):
    rows = [{"q": "1 + 1", "hint": None, "a": 2}, {"q": "1 + 2", "hint": "no", "a": "3"}]
    keys = {"columns": {"q": "question"}, "prompt": "{question}{hint}?", "completion": " {a}"}
    job = task(lines(tmp_path / "train.jsonl", rows[1:] * 12), **keys)
    assert text(job, job.splits(0)["train"][0]["input_ids"]) == "1 + 2no? 3</s>"
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: column 'a' is int, not text"):
        task(lines(tmp_path / "train.jsonl", rows), **keys).splits(0)


def written(folder, kind, rows):
    if kind == "jsonl":
        return lines(folder / "train.jsonl", rows)
    if kind == "json":
        (folder / "train.json").write_text(json.dumps(rows))
        return folder / "train.json"
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_file_of_any_kind_and_a_folder_of_splits(kind, tmp_path):
    file = written(tmp_path, kind, [{"text": f"train {n}"} for n in range(10)])
    sizes = {split: len(tokens) for split, tokens in task(file).splits(0).items()}
    assert sizes == {"train": 7, "validation": 1, "test": 2}
    lines(tmp_path / "more" / "val.jsonl", [{"text": "validation"}])
    lines(tmp_path / "test" / "0.jsonl", [{"text": "test"}, "", {"text": "test"}])
    job = task(tmp_path)
    splits = job.splits(0)
    assert {split: len(tokens) for split, tokens in splits.items()} == {"train": 10, "validation": 1, "test": 2}
    assert text(job, splits["validation"][0]["input_ids"]) == "validation</s>"
    assert splits["test"].records.name(1).endswith("0.jsonl, line 3")


def test_another_source_validates_and_tests(tmp_path, monkeypatch):
    def load(path, subset):
        asked.append((path, subset))
        return {"train": datasets.Dataset.from_list(sums(12)), "test": datasets.Dataset.from_list(sums(4, 50))}

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    file = lines(tmp_path / "train.jsonl", [{"prompt": "1?", "completion": "1"}] * 5)
    columns = {"question": "prompt", "answer": "completion"}
    job = task(file, "number", test_path="some/gsm", test_subset="main", columns=columns, validation_examples=3)
    splits = job.splits(0)
    assert asked == [("some/gsm", "main")] and [len(splits[name]) for name in ("train", "validation", "test")] == [
        5,
        3,
        4,
    ]
    assert text(job, splits["test"][0]["prompt"]) == "50 + 1?"
    assert text(job, splits["test"][0]["answer"]) == "The answer is: 51"
    assert "some/gsm, train, row" in splits["validation"].records.name(0)


BAD = {
    "no answer": ({"messages": CHAT[:2]}, "a conversation without an answer: no message is the assistant's"),
    "no last answer": ({"messages": CHAT[:4]}, "a conversation without an answer: its last message is the user's"),
    "an empty message": ({"messages": [{"role": "user", "content": " "}]}, "message 1, of user, is empty"),
    "no role": ({"messages": [{"content": "One?"}]}, "message 1 has no role, but content"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1, of user, is null, not text"),
    "a tool call": (
        {"messages": [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]},
        "message 2, of assistant, calls a tool (tool_calls), which is not read; expected text alone",
    ),
    "a call beside a text": (
        {"messages": [CHAT[1], {**CHAT[2], "function_call": {"name": "add"}}]},
        "message 2, of assistant, calls a tool (function_call), which is not read",
    ),
    "no messages": ({"messages": []}, "the conversation is []; expected a list of messages"),
    "an empty text": ({"text": "\n"}, "column 'text' is empty"),
    "an empty answer": ({"prompt": "1?", "completion": ""}, "column 'completion' is empty"),
    "a prompt that is null": ({"prompt": None, "completion": "2"}, "column 'prompt' is null, not text"),
    "a prompt without its messages": ({"prompt": CHAT[1:2], "completion": "2"}, "column 'prompt' is list, not text"),
    "no known column": ({"input": "1"}, "has the columns input; expected messages, conversations, prompt and"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1, of user, has the part {'type': 'image'}; expected one of type \"text\" with its text",
    ),
    "not an object": ("[1]", "[1] is not an object of columns"),
    "without an end": ("[" * 9000, "not JSON ("),
    "not JSON": ("{'text': 1}", "not JSON (Expecting property name"),
    "too long": ({"text": "x" * 128}, "129 tokens, and the model has 128 positions (max_position_embeddings); set"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_row_that_cannot_be_learned_is_named(fault, tmp_path):
    row, message = BAD[fault]
    file = lines(tmp_path / "rows.jsonl", [{"text": "fine"}, {"text": "fine"}, row])
    with pytest.raises(ValueError) as error:
        task(file, model=tiny_model(tmp_path / "model")).splits(0)
    assert str(error.value).startswith(f"{file}, line 3: {message}")


def test_bad_data_is_one_line_before_any_training(tmp_path):
    file = lines(tmp_path / "rows.jsonl", [{"text": "fine"}] * 9 + [{"messages": CHAT[:2]}])
    config = f"task: {{name: language, model: {{config: {json.dumps(CONFIG)}}}, data: {{path: {file}}}}}\n"
    (tmp_path / "job.yaml").write_text(config + "methods: {lora: {}}\n")
    result = CliRunner().invoke(main, ["train", str(tmp_path / "job.yaml"), f"output={tmp_path / 'run'}"])
    assert result.exit_code == 2 and "rows.jsonl, line 10: a conversation without an answer" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


OTHER = {
    "no data": ({"path": ""}, "tokens", "task.data.path: expected a file"),
    "a text has no prompt": ({}, "number", "line 1: a text has no prompt; expected task.evaluate=tokens"),
    "a limit": ({"max_length": 5}, "tokens", "line 1: 9 tokens, above task.data.max_length=5; set task.data.longer"),
    "nothing left": (
        {"max_length": 5, "longer": "cut", "prompt": "{text}", "completion": "{text}"},
        "tokens",
        "line 1: no token of an answer within task.data.max_length=5",
    ),
    "no number": (
        {"prompt": "1?", "completion": "{text}"},
        "number",
        "line 1: task.evaluate=number finds none in its answer, 'one text'; expected '#### 3' or 'The answer is 3'",
    ),
    "no option": (
        {"prompt": "1?", "completion": "{text}"},
        "option",
        "line 1: task.evaluate=option finds none in its answer, 'one text'; expected one such as 'true' or 'answer2'",
    ),
    "no column": ({"prompt": "{question}"}, "tokens", "line 1: no column 'completion', but text"),
}  # fmt: skip


@pytest.mark.parametrize("key", ["model.name", "model.tokenizer", "chat_template"])
def test_what_cannot_be_loaded_is_no_fault_of_a_row(key, tmp_path):
    job = task(lines(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 9), model=tiny_model(tmp_path / "model"))
    missing = str(tmp_path / "missing")
    setattr(job if key == "chat_template" else job.model, key.rpartition(".")[2], missing)
    with pytest.raises(ValueError, match=rf"^{missing if key == 'chat_template' else f'task.{key}={missing}'}: "):
        job.splits(0)


@pytest.mark.parametrize("fault", OTHER)
def test_keys_that_do_not_fit_the_data_are_said(fault, tmp_path):
    keys, evaluate, message = OTHER[fault]
    file = lines(tmp_path / "test.jsonl", [{"text": "one text"}] * 3)
    keys = {"path": str(lines(tmp_path / "train.jsonl", [{"text": "one text"}] * 3)), "test_path": str(file), **keys}
    with pytest.raises(ValueError) as error:
        task(keys.pop("path"), evaluate, **keys).splits(0)
    assert message in str(error.value)


@pytest.mark.parametrize(("longer", "kept"), [("leave_out", ["short</s>"]), ("cut", ["short</s>", "quite long"])])
def test_long_rows_are_left_out_or_cut(longer, kept, tmp_path):
    rows = [{"text": "short"}, {"text": "quite long a text"}, {"text": "x" * 40}]
    keys = {
        "max_length": 10,
        "longer": longer,
        "max_characters": 39,
        "test_path": str(lines(tmp_path / "t.json", rows[:1])),
    }
    job = task(lines(tmp_path / "rows.jsonl", rows * 10), **keys)
    splits = job.splits(0)
    assert {text(job, splits["train"][index]["input_ids"]) for index in range(len(splits["train"]))} == set(kept)


def test_a_template_that_rewrites_the_conversation_is_refused(tmp_path):
    template = "{{ messages | length }}" + TEMPLATE  # the number is another one at each turn
    job = task(lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), model=tiny_model(tmp_path / "model", template))
    with pytest.raises(ValueError, match=r"line 1: its answers are not where .* set task.data.answers_only=false"):
        job.splits(0)
    job = task(lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), model=tiny_model(tmp_path / "other", None))
    with pytest.raises(
        ValueError, match=r"line 1: task.model.name=.*other has no chat template; set task.chat_temp.* or give"
    ):
        job.splits(0)
    (tmp_path / "my.jinja").write_text(TEMPLATE)
    job.chat_template, job.data.path = (
        str(tmp_path / "my.jinja"),
        str(lines(tmp_path / "b.jsonl", [{"messages": CHAT}] * 9)),
    )
    del job.tokenizer
    assert "<assistant>1</assistant>" in text(job, job.splits(0)["train"][0]["input_ids"])


def test_packed_examples_do_not_see_each_other(tmp_path):
    rows = [{"prompt": f"{n} + {n}?", "completion": f"{2 * n}" * (n + 1)} for n in range(8)]
    file = lines(tmp_path / "rows.jsonl", rows)
    keys = {"max_length": 64, "validation_share": 0.13, "test_share": 0.13}
    apart, packed = (task(file, packing=packing, **keys) for packing in (False, True))
    model = apart.build().double().eval()
    examples = apart.splits(0)["train"]
    total, count = 0.0, 0
    for index in range(len(examples)):
        batch = apart.collate([examples[index]])
        number = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, count = total + model(**batch).loss * number, count + number
    together = packed.splits(0)["train"]
    assert 1 < len(together) < len(examples)
    batch = packed.collate([together[index] for index in range(len(together))])
    assert int((batch["labels"] != IGNORED).sum()) == count
    torch.testing.assert_close(model(**batch).loss, total / count)


# ----------------------------------------------------------------------------------------------------------- answers

JUDGED = [
    ("number", "4 + 5 = 9. The answer is: 9", 9.0),
    ("number", "The answer is 5. No. The final answer is: $1.50.", 1.5),
    ("number", "so 2\n#### 20/8", 2.5),
    ("number", "The answer is: 50%\nThanks!", 50.0),
    ("number", "The answer is: x+1", "x+1"),
    ("number", "The answer is: 1/0", "1/0"),
    ("number", "nine", None),
    ("option", "the correct answer is answer3, not answer2", "answer3"),
    ("option", "the correct answer is true", "true"),
    ("option", "I don't know", None),
    ("text", "  a\n b ", "a b"),
    ("text", " ", None),
]


@pytest.mark.parametrize(("kind", "given", "expected"), JUDGED)
def test_the_answer_in_a_text(kind, given, expected):
    assert ANSWERS[kind](given) == expected


def test_an_answer_that_cannot_be_found_is_wrong():
    right = ["#### 1", "#### 2", "#### 0.5", "#### 4"]
    assert accuracy("number", ["The answer is: 1.0", "2", "The answer is 1/2", "The answer is: four"], right) == 0.5


def test_generated_answers_do_not_depend_on_the_batch_and_end_at_the_last_position(tmp_path):
    rows = [{"prompt": "x" * n, "completion": "The answer is: 1"} for n in (3, 126, 40, 5)]
    short = str(lines(tmp_path / "train.jsonl", rows[:1] * 9))
    job = task(short, "number", test_path=str(lines(tmp_path / "test.jsonl", rows)))
    examples, model = job.splits(0)["test"], job.build().eval()
    batches = [job.collate([examples[index]]) for index in range(4)]
    batches.append(job.collate([examples[index] for index in (0, 2, 3)]))
    answers = [job.predict(model, {key: batch[key] for key in ("input_ids", "attention_mask")}) for batch in batches]
    assert answers[1].shape == (1, 2)  # of 128 positions
    for row, index in enumerate((0, 2, 3)):
        assert torch.equal(answers[4][row], answers[index][0])
    padded = np.where(np.arange(6) < 5, examples[0]["answer"][:6], IGNORED)[None]
    right = SimpleNamespace(predictions=np.array([examples[0]["answer"]]), label_ids=np.array([examples[1]["answer"]]))
    assert job.metrics(right) == {"accuracy": 1} and job.tokenizer.eos_token_id == 1
    assert job.metrics(SimpleNamespace(predictions=padded, label_ids=right.label_ids)) == {"accuracy": 0}


def test_token_accuracy_counts_the_next_token_of_answers():
    logits = torch.zeros(2, 4, 5)
    for row, tokens in enumerate([[3, 1, 4, 0], [2, 2, 2, 2]]):
        logits[row, range(4), tokens] = 1
    labels = np.array([[IGNORED, 3, IGNORED, 4], [IGNORED, IGNORED, 2, 1]])
    assert token_accuracy(top_tokens((logits, None)).numpy(), labels) == 3 / 4
    logits[1, 1, 0] = math.nan
    assert math.isnan(token_accuracy(top_tokens(logits).numpy(), labels))


# ------------------------------------------------------------------------------------------------------------- model


def test_a_base_in_four_bits_gets_the_ranks_of_the_dense_one(tmp_path):
    name = str(tiny_model(tmp_path / "model"))
    notes = {}
    for four in (False, True):
        for method in ("lora", "flora"):
            model = LanguageModel(name=name, load_in_4bit=four).build("AutoModelForCausalLM")
            notes[method, four] = adapt(method, model, [], 600, {}, target_modules="all-linear").notes
    assert notes["lora", True] == notes["lora", False] == ["rank 2 on 7 layers"]
    assert notes["flora", True] == notes["flora", False]
    for method in ("full", "bitfit", "lora_ga", "corda"):
        with pytest.raises(CannotAdapt, match="it changes the model's weights, which are quantized"):
            adapt(method, model, [], 600, {})
    with pytest.raises(ValueError, match="load_in_4bit"):
        LanguageModel(config=CONFIG, load_in_4bit=True)


ADAPTERS = [method for method in METHODS if method not in ("full", "head", "bitfit")]
BASES = {  # and which adapters third parties can't set up or train on them
    "bfloat16": (),
    "4 bits": ("pissa", "orthogonal", "lora_ga", "corda", "loha", "lokr"),
    "8 bits": ("pissa", "orthogonal", "lora_ga", "corda", "dora", "adalora"),  # AdaLoRA with mixed precision only
}
FEW_BITS = [(method, base) for base, unable in BASES.items() for method in ADAPTERS if method not in unable]


def few_bits(folder, base):
    name = tiny_model(folder / "model", hidden_size=64, intermediate_size=64)
    if base == "8 bits":
        eight = BitsAndBytesConfig(load_in_8bit=True)
        LlamaForCausalLM.from_pretrained(name, quantization_config=eight, dtype=torch.bfloat16).save_pretrained(name)
    return LanguageModel(name=str(name), dtype="bfloat16", load_in_4bit=base == "4 bits")


@pytest.mark.parametrize(("method", "base"), FEW_BITS)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_frozen_weights_may_have_few_bits_and_adapters_have_32(method, base, tmp_path):
    job = task(lines(tmp_path / "rows.jsonl", [{"prompt": "say a:", "completion": "aaaa"}] * 12))
    job.model = few_bits(tmp_path, base)
    adapted = adapt(method, job.build(), [], 3000, {}, target_modules="all-linear")
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    first_steps(adapted.model, job, job.splits(0)["train"], Training(batch_size=4), adapted.optimizer)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trained.items())
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "error"), [({"init_lora_weights": "pissa"}, CannotAdapt), ({"init_lora_weights": "none"}, ValueError)]
)
def test_what_quantized_weights_forbid_is_told_from_a_wrong_option(options, error, tmp_path):
    model = few_bits(tmp_path, "4 bits").build("AutoModelForCausalLM")
    with pytest.raises(ValueError) as raised:
        adapt("lora", model, [], 3000, options, target_modules="all-linear")
    assert type(raised.value) is error


class Stop(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch >= 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["houlsby", "locon"])
def test_adapters_that_transformers_does_not_know_resume_on_four_bits(method, tmp_path):
    job = task(lines(tmp_path / "rows.jsonl", [{"prompt": "say a:", "completion": "aaaa"}] * 12))
    job.model, ends = few_bits(tmp_path, "4 bits"), {}
    for name, stops in (("whole", [()]), ("resumed", [(Stop(),), ()])):
        for callbacks in stops:
            torch.manual_seed(0)
            model = adapt(method, job.build(), [], 3000, {}, target_modules="all-linear").model
            keys, place = Training(epochs=2, batch_size=4), tmp_path / name
            with pytest.raises(KeyboardInterrupt) if callbacks else nullcontext():
                fit(method, model, job, job.splits(0), keys, 0, place, place / "logs", callbacks, bar=False)
        ends[name] = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    assert all(map(torch.equal, ends["whole"], ends["resumed"]))


@pytest.mark.parametrize("four", [False, True], ids=["dense", "4bit"])
def test_it_trains_and_checkpointing_changes_nothing(four, tmp_path):
    file = lines(tmp_path / "rows.jsonl", [{"prompt": "say a:", "completion": "aaaa"}] * 24)
    job = task(file, model=tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=64))
    job.model.load_in_4bit = four
    accuracies = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = adapt("lora", job.build(), [], 1200, {}, target_modules="all-linear")
        keys = Training(epochs=6, batch_size=8, learning_rate=0.1, gradient_checkpointing=checkpointing)
        place = tmp_path / str(checkpointing)
        outcome = fit("lora", adapted.model, job, job.splits(0), keys, 0, place, place / "logs", bar=False)
        history = outcome.trainer.state.log_history
        accuracies.append([log["eval_token_accuracy"] for log in history if "eval_token_accuracy" in log])
        losses = [log["loss"] for log in history if "loss" in log]
        assert losses[-1] < losses[0] - 0.3
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_those_of_trl_and_have_the_loss_of_the_model(packing, tmp_path, monkeypatch):
    data = {"packing": packing, "max_length": 24, "answers_only": False}
    job, ends = task(lines(tmp_path / "rows.jsonl", [{"prompt": "say a:", "completion": "aaaa"}] * 12), **data), []
    for trainer in (SFTTrainer, Trainer):
        torch.manual_seed(0)
        model = adapt("flora", job.build(), ["lm_head"], 1200, {}, target_modules=["q_proj"]).model
        keys, place = Training(epochs=2, batch_size=4, learning_rate=1e-2), tmp_path / trainer.__name__
        outcome = fit("flora", model, job, job.splits(0), keys, 0, place, place / "logs", bar=False)
        assert isinstance(outcome.trainer, SFTTrainer) == (trainer is SFTTrainer)
        ends.append([weight for weight in outcome.model.parameters() if weight.requires_grad])
        assert "forward" not in vars(outcome.model.get_base_model())
        monkeypatch.setattr(Language, "trainer", Task.trainer)
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)  # Adam enlarges rounding errors of tiny gradients


HEADS = {
    "as it was": (lambda model: model, True),
    "trained": (lambda model: adapt("lora", model, ["lm_head"], 600, {}, target_modules=["q_proj"]).model, True),
    "with an adapter": (lambda model: adapt("flora", model, [], 1200, {}, target_modules=["lm_head"]).model, False),
    "with one of LyCORIS": (lambda model: adapt("locon", model, [], 1200, {}, target_modules=["lm_head"]).model, False),
}


@pytest.mark.parametrize("head", HEADS)
def test_an_adapted_output_layer_is_trained_by_transformers_own_trainer(head, tmp_path):
    adapted, fits_trl = HEADS[head]
    job = task(lines(tmp_path / "rows.jsonl", [{"prompt": "say a:", "completion": "aaaa"}] * 12))
    model = adapted(job.build())
    before = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
    assert issubclass(job.trainer(model), SFTTrainer) == fits_trl
    first_steps(model, job, job.splits(0)["train"], Training(batch_size=4, learning_rate=0.1))
    after = [weight for weight in model.parameters() if weight.requires_grad]
    assert not all(map(torch.equal, before, after))


def test_a_token_that_the_model_does_not_know_is_named(tmp_path):
    job = task(lines(tmp_path / "rows.jsonl", [{"text": "fine"}] * 9 + [{"text": "z"}]))
    job.model.config["vocab_size"] = 124  # z is 125
    with pytest.raises(ValueError, match=r"line 10: token 125 of the tokenizer's 259; the model has 124 only"):
        job.check(job.splits(0))


def test_lm_eval_is_asked_after_training(tmp_path, monkeypatch):
    batches = []

    def hflm(pretrained, tokenizer, batch_size):
        batches.append(batch_size)
        return pretrained

    def evaluate(model, tasks):
        return {"results": {task: {"alias": task, "acc,none": 0.5, "acc_stderr,none": 0.1} for task in tasks}}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=evaluate),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda: SimpleNamespace(all_tasks=["arc_easy"])),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=hflm),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    job = task(lines(tmp_path / "rows.jsonl", [{"text": "fine"}] * 9))
    job.lm_eval = ["arc_easy"]
    job.check(job.splits(0))
    for job.lm_eval_batch in (None, 32):
        assert job.judge(job.build(), None, {}, tmp_path) == {"test": {"arc_easy acc": 0.5}}
    assert batches == [8, 32]
    job.lm_eval = ["arc_hard"]
    with pytest.raises(ValueError, match="lm-eval has no task 'arc_hard'"):
        job.check(job.splits(0))


def test_forgetting_is_the_rise_of_the_loss_per_token_of_the_long_texts(tmp_path):
    rows = [{"text": "fine"}] * 9
    job = task(lines(tmp_path / "rows.jsonl", rows))
    settings = job.decisive()
    texts = ["short", "a text of nineteen.", "a longer text, which is cut", "x" * 9]
    file = lines(tmp_path / "other.jsonl", [{"text": text} for text in texts])
    job.forgetting = Passages(str(file), characters=9, examples=2, max_length=20)
    assert job.decisive() == settings
    model, base = job.build(), job.build()
    total, count = [0.0, 0.0], 0
    for text in ("a text of nineteen.", "a longer text, whic"):
        ids = torch.tensor([[*job.tokenizer(text)["input_ids"]]])
        count += ids.numel() - 1
        for place, one in enumerate((model, base)):
            total[place] += one(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
    found = job.judge(model, lambda: base, {}, tmp_path)["test"]
    assert found == {"forgetting": pytest.approx((total[0] - total[1]) / count, rel=1e-4)}
    assert job.judge(base, lambda: base, {}, tmp_path) == {"test": {"forgetting": 0.0}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": ""}, "task.forgetting.path: expected a file"),
        ({"column": "words"}, "other.jsonl, line 1: no text in column 'words'"),
        ({"characters": 5}, "other.jsonl: no text of 5 characters (task.forgetting.characters)"),
        ({"characters": 1, "max_length": 1}, "other.jsonl, line 1: a single token, so there is no next one to predict"),
    ],
)
def test_other_texts_that_say_nothing_are_refused_before_training(keys, message, tmp_path):
    job = task(lines(tmp_path / "rows.jsonl", [{"text": "fine"}] * 9))
    job.forgetting = Passages(**{"path": str(lines(tmp_path / "other.jsonl", [{"text": "long"}])), **keys})
    with pytest.raises(ValueError) as error:
        job.check(job.splits(0))
    assert message in str(error.value)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    file = lines(tmp_path / "rows.jsonl", [{"text": "fine"}] * 9)
    config = (
        f"task: {{name: language, lm_eval: [a], model: {{config: {json.dumps(CONFIG)}}}, data: {{path: {file}}}}}\n"
    )
    (tmp_path / "job.yaml").write_text(config + "methods: {lora: {}}\n")
    result = CliRunner().invoke(main, ["train", str(tmp_path / "job.yaml"), f"output={tmp_path / 'run'}"])
    assert result.exit_code == 2 and "pip install 'flora-peft[lm-eval]'" in result.stderr


@pytest.mark.parametrize("steps", [1, 2])
def test_word_problems_are_right_and_always_the_same(steps):
    made = problems(steps)
    assert made == problems(steps) and len({row["prompt"] for row in made}) == 3000
    for row in made[:200]:
        number, *changes = [
            int(word) for word in row["prompt"].replace(",", "").replace(".", "").split() if word.isdigit()
        ]
        words = [word for word in row["prompt"].split() if word in ("gets", "gives")]
        assert len(changes) == steps
        for word, change in zip(words, changes, strict=True):
            number += change if word == "gets" else -change
            assert 0 <= number < 20
        assert ANSWERS["number"](row["completion"]) == number


def test_a_job_on_a_base_in_four_bits(tmp_path):
    model = tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=64)
    file = lines(tmp_path / "rows.jsonl", [{"prompt": "say a:", "completion": "aaaa"}] * 12)
    keys = f"name: {model}, load_in_4bit: true"
    config = f"task: {{name: language, model: {{{keys}}}, data: {{path: {file}}}}}\nbudget: 2000\n"
    (tmp_path / "job.yaml").write_text(
        config + "methods: {full: {}, lora: {}, loha: {}, adalora: {}, houlsby: {}, flora: {}}\n"
    )
    short = ["training.epochs=1", "training.batch_size=4", f"output={tmp_path / 'run'}"]
    result = CliRunner().invoke(main, ["train", str(tmp_path / "job.yaml"), *short])
    assert result.exit_code == 0, result.output
    assert "full is left out: it changes the model's weights, which are quantized" in result.stderr
    assert "loha is left out at 2000 parameters: its first steps fail on quantized weights: " in result.stderr
    file = tmp_path / "run" / "results.jsonl"
    rows = {row["way"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == ["lora", "adalora", "houlsby", "flora"]
    dense = LlamaForCausalLM.from_pretrained(model).num_parameters()
    assert {row["model_parameters"] for row in rows.values()} == {dense}
    adapters = [rows[name] for name in ("adalora", "flora", "lora")]
    assert all(row["loaded_difference"] < 0.2 for row in adapters)  # of 5; bitsandbytes has a kernel for evaluation
    assert all(rows[name]["merged_difference"] < 1 for name in ("flora", "lora"))  # merging quantizes anew
    assert "merged_difference" not in rows["adalora"] and "not merged: it can't" in result.output


def test_lora_merges_into_four_bits_what_it_has_evaluated(tmp_path):
    model = LanguageModel(name=str(tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=64)))
    model.load_in_4bit = True
    options = {"init_lora_weights": False, "lora_alpha": 1}
    adapted = adapt("lora", model.build("AutoModelForCausalLM"), [], 1200, options, target_modules="all-linear").model
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    with torch.no_grad():
        wanted = [dense_of(layer.base_layer, "weight") + layer.get_delta_weight("default") for layer in layers]
        for layer in layers:  # what the first evaluation does on some CPUs
            weight = layer.base_layer.weight
            if not getattr(weight.quant_state, "packing_format_for_cpu", False):
                weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        in_standard_order(adapted)
        with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
            adapted.merge_adapter()
    for layer, dense in zip(layers, wanted, strict=True):  # nf4 is off by 9 %
        assert (dense_of(layer.base_layer, "weight") - dense).norm() < 0.15 * dense.norm()
