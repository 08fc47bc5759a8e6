"""Visual instruction: what is read and refused, which tokens are learned, what is adapted, and that it trains."""

import io
import json
import os
import sys
from types import SimpleNamespace

import datasets
import pytest
import tiny_processors
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flora_lab.methods import CannotAdapt, adapt
from flora_lab.run.saved import save
from flora_lab.tasks.data.dialogues import Dialogues, spread
from flora_lab.tasks.data.tokens import IGNORED
from flora_lab.tasks.evaluation import lmms_eval
from flora_lab.tasks.evaluation.answers import accuracy
from flora_lab.tasks.models.image_text import ImageTextModel
from flora_lab.tasks.visual_instruction import VisualInstruction

TEXT = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
CONFIG = {"model_type": "llava", "image_token_index": 259, "text_config": TEXT, "vision_config": VISION}
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
TOKENS = 4  # of a picture


def said(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def rows(count=24):
    return [
        {"id": str(n), "image": f"{name}.png", "conversations": said("<image>\nWhich colour?", name)}
        for n, name in zip(range(count), ["red", "blue"] * count, strict=False)
    ]


def llava(folder, some=None, name="train.json"):
    """A file of LLaVA's form, and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour, value in COLOURS.items():
        Image.new("RGB", (20, 12), value).save(folder / f"{colour}.png")
    (folder / name).write_text(json.dumps(rows() if some is None else some))
    return folder / name


def tiny_keys(folder, path):
    """Overrides with which a YAML of this task runs on next to nothing; ``test_train`` uses them too."""
    llava(folder / "data")
    return [
        f"task.data.path={folder / 'data' / 'train.json'}",
        "task.data.images=null",
        "task.data.test_share=0.2",
        "task.data.validation_share=0.1",
        "task.model.name=null",
        "task.model.dtype=float32",
        f"task.model.config={json.dumps(CONFIG)}",
        "task.data.max_length=100",
        "task.lmms_eval=[]",
        "task.new_tokens=2",
        "training.batch_size=4",
        "training.loaders=0",
        "training.gradient_checkpointing=false",
        "training.eval_steps=null",
        "budget=600",
    ]


def saved(folder):
    """A LLaVA of no size and its processor, as users have theirs; 4 bits need widths of 64."""
    wide = {"hidden_size": 64, "intermediate_size": 64}
    config = {**CONFIG, "text_config": {**TEXT, **wide}, "vision_config": {**VISION, **wide}}
    model = ImageTextModel(config=json.loads(json.dumps(config)))
    model.build("AutoModelForImageTextToText").save_pretrained(folder)
    processor = model.load_processor()
    processor.tokenizer = fast_bytes()
    processor.save_pretrained(folder)
    return str(folder)


def fast_bytes():
    """A tokenizer of bytes that AutoProcessor finds for a LLaVA, which has a fast one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special = [*names.values(), "<image>"]  # the last is 259, as CONFIG has it
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*letters, *special])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **names)


def task(path, evaluate="text", **keys):
    data = {name: keys.pop(name) for name in ("images", "image", "markup", "max_length", "test_path") if name in keys}
    model = ImageTextModel(config=json.loads(json.dumps(CONFIG)))
    return VisualInstruction(
        model=model, data=Dialogues(path=str(path), **data), evaluate=evaluate, new_tokens=3, **keys
    )


MODELS = {"llava": None, "qwen2_vl": tiny_processors.qwen2_vl, "idefics3": tiny_processors.idefics3}


def task_of(kind, folder, path, evaluate="text"):
    """A task with another image-text model, whose processor it makes in ``folder``."""
    if kind == "llava":
        return task(path, evaluate)
    model = ImageTextModel(config=MODELS[kind](folder / kind), tokenizer=str(folder / kind))
    part = "text_model" if kind == "idefics3" else "language_model"
    return VisualInstruction(model=model, data=Dialogues(path=str(path)), evaluate=evaluate, new_tokens=3, parts=[part])


def shown(job, ids):
    return "".join("_" if one == IGNORED else "*" if one == 259 else job.tokenizer.decode([one]) for one in ids)


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("several", [False, True])
def test_a_broken_picture_of_the_hub_is_named(several, tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (9, 5), COLOURS["red"]).save(file, "PNG")
    cells = [{"bytes": content, "path": None} for content in [file.getvalue()] * 19 + [b"PNG"]]
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    columns = {
        "image": [[cell] for cell in cells] if several else cells,
        "messages": [[{"role": "user", "content": "<image> ?"}, {"role": "assistant", "content": "red"}]] * 20,
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", feature)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset: datasets.DatasetDict(train=table))
    job = task("some/pictures", "tokens", image="image")
    splits = job.splits(0)
    assert splits["train"][0]["images"][0].getpixel((0, 0)) == COLOURS["red"]
    with pytest.raises(ValueError, match="some/pictures, train, row 19: .*cannot identify image"):
        job.check(splits)


PICTURE = {"type": "image"}


def parts(*content):
    """Messages in transformers' form."""
    texts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return [{"role": "user", "content": texts}, answer]


TURNS = {
    "one picture": (
        {"image": "red.png", "conversations": said("<image>\nColour?", "red")},
        "USER: ****\nColour? ASSISTANT: red</s>",
        "_" * 30 + "red</s>",
    ),
    "two turns": (
        {"image": "red.png", "conversations": said("<image>\nColour?", "red", "Sure?", "yes")},
        "USER: ****\nColour? ASSISTANT: red</s>USER: Sure? ASSISTANT: yes</s>",
        "_" * 30 + "red</s>" + "_" * 23 + "yes</s>",
    ),
    "two pictures": (
        {"image": ["red.png", "blue.png"], "conversations": said("<image> One?", "red", "<image> Two?", "blue")},
        "USER: ****\nOne? ASSISTANT: red</s>USER: ****\nTwo? ASSISTANT: blue</s>",
        "_" * 27 + "red</s>" + "_" * 27 + "blue</s>",
    ),
    "parts": (
        {"image": ["red.png", "blue.png"], "messages": parts(PICTURE, "One", PICTURE, "Two?")},
        "USER: ****\nOne****\nTwo? ASSISTANT: red</s>",
        "_" * 35 + "red</s>",
    ),
    "parts with their pictures": (
        {"messages": parts({"type": "image", "path": "red.png"}, "One?")},
        "USER: ****\nOne? ASSISTANT: red</s>",
        "_" * 27 + "red</s>",
    ),
    "no picture": (
        {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]},
        "USER: One? ASSISTANT: 1</s>",
        "_" * 22 + "1</s>",
    ),
}


@pytest.mark.parametrize("kind", TURNS)
def test_the_loss_counts_the_answers(kind, tmp_path):
    row, whole, learned = TURNS[kind]
    job = task(llava(tmp_path, [row] * 10))
    batch = job.collate([job.splits(0)["train"][0]])
    assert shown(job, batch["input_ids"][0].tolist()) == whole
    assert shown(job, batch["labels"][0].tolist()) == learned
    pictures = batch["input_ids"].eq(259).sum().item() // TOKENS
    assert (batch["pixel_values"].shape == (pictures, 3, 16, 16)) if pictures else "pixel_values" not in batch


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_has_the_loss_of_its_examples(kind, tmp_path):
    job = task_of(kind, tmp_path, llava(tmp_path, [row for row, _, _ in TURNS.values()] * 3))
    model, examples = job.build().double().eval(), [job.splits(0)["train"][index] for index in range(6)]
    total, count = 0.0, 0
    for example in examples:
        batch = job.collate([example])
        number = int((batch["labels"] != IGNORED).sum())
        total, count = total + model(**batch).loss * number, count + number
    torch.testing.assert_close(model(**job.collate(examples)).loss, total / count)


@pytest.mark.parametrize("kind", MODELS)
def test_answers_do_not_depend_on_the_batch(kind, tmp_path):
    job = task_of(kind, tmp_path, llava(tmp_path, [row for row, _, _ in TURNS.values()] * 10))
    model, examples = job.build().eval(), [job.splits(0)["test"][index] for index in range(4)]
    batches = [job.collate([example]) for example in examples]
    alone = [job.predict(model, {key: batch[key] for key in batch if key != "labels"})[0] for batch in batches]
    batch = job.collate(examples)
    together = job.predict(model, {key: batch[key] for key in batch if key != "labels"})
    assert all(torch.equal(one[: len(other)], other[: len(one)]) for one, other in zip(together, alone, strict=True))
    assert job.tokenizer.decode(batches[0]["labels"][0]) == examples[0]["answer"]


def test_a_test_file_has_its_own_pictures(tmp_path):
    file = llava(tmp_path / "train")
    test = llava(tmp_path / "test", rows(2), "test.json")
    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "test" / "red.png")
    splits = task(file, "tokens", test_path=str(test)).splits(0)
    colours = {name: {rows[i]["images"][0].getpixel((0, 0)) for i in range(len(rows))} for name, rows in splits.items()}
    assert colours["train"] == {(255, 0, 0), (0, 0, 255)} and colours["test"] == {(0, 255, 0), (0, 0, 255)}


def test_a_folder_of_pictures_and_encoded_ones(tmp_path):
    llava(tmp_path / "pictures")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    job = task(tmp_path / "train.jsonl", images=str(tmp_path / "pictures"))
    job.check(job.splits(0))
    file = io.BytesIO()
    Image.new("L", (9, 9), 255).save(file, "PNG")
    cells = [{"image": {"bytes": file.getvalue(), "path": None}, "conversations": said("<image> ?", "white")}] * 10
    datasets.Dataset.from_list(cells).to_parquet(tmp_path / "p.parquet")
    encoded = task(tmp_path / "p.parquet")
    splits = encoded.splits(0)
    encoded.check(splits)
    assert splits["train"][0]["images"][0].getpixel((0, 0)) == (255, 255, 255)


BAD = {
    "no answer": ({"conversations": said("One?")}, "a conversation without an answer: no message is the assistant's"),
    "no conversation": ({"c": 1, "a": 1, "b": 1}, "has the columns c, a, b; expected conversations or messages"),
    "no tag": (
        {"image": "red.png", "conversations": said("?", "a")},
        "'<image>' stands in it 0 times, but column 'image'",
    ),
    "no picture": (
        {"conversations": said("<image> ?", "a")},
        "'<image>' stands in it 1 times, but column 'image' has 0",
    ),
    "another tag": (
        {"image": "red.png", "conversations": said("<|image_1|> ?", "a")},
        "unknown image token '<|image_1|>'; expected '<image>'",
    ),
    "another tag beside it": (
        {"image": "red.png", "conversations": said("<image> <img> ?", "a")},
        "unknown image token '<img>'; expected '<image>', or task.data.markup=true if it is mere text",
    ),
    "a video": ({"conversations": said("<video> ?", "a")}, "unknown image token '<video>'; expected '<image>'"),
    "a numbered tag": ({"conversations": said("<image_1> ?", "a")}, "unknown image token '<image_1>'; expected"),
    "a tag of Gemma": ({"conversations": said("<start_of_image> ?", "a")}, "unknown image token '<start_of_image>'"),
    "a tag of Pixtral": ({"conversations": said("[IMG] ?", "a")}, "unknown image token '[IMG]'; expected '<image>'"),
    "a tag among parts": ({"messages": parts("<image_1> ?")}, "unknown image token '<image_1>'; expected '<image>'"),
    "a part too many": (
        {"image": "red.png", "messages": parts(PICTURE, PICTURE, "?")},
        "'<image>' stands in it 2 times, but column 'image' has 1 pictures",
    ),
    "a part of a video": (
        {"messages": parts({"type": "video"}, "?")},
        "message 1, of user, has the part {'type': 'video'}; expected one of type \"text\" with its text or \"image\"",
    ),
    "pictures in two places": (
        {"image": "red.png", "messages": parts({"type": "image", "url": "red.png"}, "?")},
        "has pictures both in column 'image' and in its messages",
    ),
    "a number for a picture": (
        {"image": 5, "conversations": said("<image> ?", "a")},
        "column 'image' is 5; expected a path, a picture, or a list of them",
    ),
    "a picture of text": (
        {"image": {"bytes": "PNG"}, "conversations": said("<image> ?", "a")},
        "column 'image' is {'bytes': 'PNG'}; expected a path, a picture",
    ),
    "a tag in an answer": ({"conversations": said("?", "<image>")}, "only a user's message may hold '<image>'"),
    "a lost picture": (
        {"image": "green.png", "conversations": said("<image> ?", "a")},
        "column 'image' is not a readable image: missing",
    ),
    "a broken picture": (
        {"image": "broken.png", "conversations": said("<image> ?", "a")},
        "column 'image' is not a readable image: not a picture",
    ),
    "too long": (
        {"conversations": said("?", "x" * 128)},
        "148 tokens with its pictures; the model has 128 positions (max_position_embeddings)",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_row_that_cannot_be_learned_is_named(fault, tmp_path):
    row, message = BAD[fault]
    file = llava(tmp_path, [*rows(11), row])
    (tmp_path / "broken.png").write_bytes(b"PNG")
    job = task(file, "tokens")
    with pytest.raises(ValueError) as error:
        job.check(job.splits(0))
    assert f"{file}, row 11" in str(error.value) and message in str(error.value)


def test_the_first_row_of_the_file_is_named(tmp_path):
    file = llava(tmp_path, [{"conversations": said("<image> ?", "a")}] * 12)
    job = task(file)
    with pytest.raises(ValueError, match=f"^{file}, row 0: "):
        job.check(job.splits(0))


@pytest.mark.parametrize("key", ["model.name", "model.tokenizer", "chat_template"])
def test_what_cannot_be_loaded_is_no_fault_of_a_row(key, tmp_path):
    job = task(llava(tmp_path))
    job.model = ImageTextModel(name=saved(tmp_path / "model"))
    missing = str(tmp_path / "missing")
    setattr(job if key == "chat_template" else job.model, key.rpartition(".")[2], missing)
    with pytest.raises(ValueError, match=rf"^{missing if key == 'chat_template' else f'task.{key}={missing}'}: "):
        job.splits(0)


def test_a_processor_without_a_chat_template_is_named(tmp_path):
    job = task_of("qwen2_vl", tmp_path, llava(tmp_path))
    (tmp_path / "qwen2_vl" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"^task.model.tokenizer=.* has no chat template; set task.chat_template$"):
        job.splits(0)


def test_every_row_is_measured_with_its_pictures(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    large = {"image": "large.png", "conversations": said("<image> Which?", "red")}
    file = llava(tmp_path, [*rows(9), large, *rows(3)])  # with the shortest text
    job = task_of("qwen2_vl", tmp_path, file, "tokens")
    splits, sizes = job.splits(0), {}
    for some in splits.values():
        for n in range(len(some)):
            sizes[some.records.name(n)] = job.collate([some[n]])["input_ids"].shape[1]
    size = sizes.pop(f"{file}, row 9")
    assert max(sizes.values()) < size
    job.data.max_length = size
    job.check(splits)
    job.data.max_length = size - 1
    with pytest.raises(ValueError, match=rf"row 9: {size} tokens with its pictures; task.data.max_length={size - 1}$"):
        job.check(splits)


def test_a_picture_that_the_processor_refuses_is_named(tmp_path):
    Image.new("RGB", (402, 2)).save(tmp_path / "stripe.png")
    stripe = {"image": "stripe.png", "conversations": said("<image> ?", "red")}
    job = task_of("qwen2_vl", tmp_path, llava(tmp_path, [*rows(9), stripe]))
    with pytest.raises(ValueError, match=r"train.json, row 9: its processor refuses it: absolute aspect ratio"):
        job.check(job.splits(0))


def test_a_prompt_leaves_a_position_for_its_answer(tmp_path):
    test = llava(tmp_path, [{"conversations": said("x" * 110, "a")}] * 2, "test.json")
    job = task(llava(tmp_path), test_path=str(test))
    with pytest.raises(ValueError, match="test.json, row 0: 129 tokens with its pictures; the model has 128 positions"):
        job.check(job.splits(0))


def test_markup_is_text_where_it_is_said(tmp_path):
    row = {"image": "red.png", "conversations": said("<image> What is <img> in HTML?", "Like <video>, a tag.")}
    job = task(llava(tmp_path, [row] * 10), "tokens", markup=True)
    job.check(job.splits(0))
    assert job.splits(0)["train"][0]["text"] == (
        "USER: <image>\nWhat is <img> in HTML? ASSISTANT: Like <video>, a tag.</s>"
    )
    job = task(llava(tmp_path, [{**row, "image": None}] * 10), "tokens", markup=True)
    with pytest.raises(ValueError, match="unknown image token '<img>'; expected '<image>'$"):
        job.check(job.splits(0))


def test_a_models_own_token_is_never_text(tmp_path):
    job = task_of(
        "qwen2_vl", tmp_path, llava(tmp_path, [{"conversations": said("<|video_pad|> ?", "a")}] * 10), "tokens"
    )
    job.data.markup = True
    with pytest.raises(ValueError, match=r"'<\|video_pad\|>', which is the model's own; expected '<image>'"):
        job.check(job.splits(0))


def test_a_picture_for_each_token_in_the_text_that_the_model_reads():
    ids, labels = [1, 9, 2, 9, 3, 4], [-100, -100, -100, -100, 3, 4]
    assert spread(ids, labels, [1, 9, 9, 2, 9, 9, 3, 4], 9) == [-100] * 6 + [3, 4]
    assert spread([3, 4], [-100, 4], [3, 4], 9) == [-100, 4]
    assert spread([9, 5], [-100, 5], [7, 9, 7, 9, 5], 9) == [-100] * 4 + [5]
    for seen in ([1, 9, 9, 2, 9, 9, 4], [0, 1, 9, 2, 9, 3, 4], [1, 9, 9, 9, 3, 4]):
        with pytest.raises(ValueError, match="changes more of its text"):
            spread(ids, labels, seen, 9)


# ----------------------------------------------------------------------------------------------------------- answers


def test_vqa_accuracy_is_the_share_of_people_up_to_three():
    people = "\n".join(["Two"] * 2 + ["three"] * 8)
    assert accuracy("vqa", ["2."], [people]) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert accuracy("vqa", ["the Three", "four"], [people, people]) == 0.5
    assert accuracy("vqa", ["A dog!", "cat"], ["dog", "dog"]) == 0.5


def test_peoples_answers_are_the_labels_for_vqa(tmp_path):
    some = [{**row, "answers": [{"answer": "red"}, {"answer": "crimson"}]} for row in rows()]
    for answers, named in (("red", "'red'"), ([{"text": "red"}], "[{'text': 'red'}]"), ([1], "[1]")):
        job = task(llava(tmp_path, [{**row, "answers": answers} for row in rows()]), "vqa")
        with pytest.raises(ValueError) as error:
            job.check(job.splits(0))
        assert f"column 'answers' is {named}; expected a list of texts" in str(error.value)
    for evaluate, answers in (("vqa", {"red\ncrimson"}), ("text", {"red", "blue"})):
        test = task(llava(tmp_path, some), evaluate).splits(0)["test"]
        assert {test[index]["answer"] for index in range(len(test))} == answers


# ------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("kind", ["qwen2_vl", "idefics3"])
def test_other_models_learn_the_answers(kind, tmp_path):
    job = task_of(kind, tmp_path, llava(tmp_path), "tokens")
    splits = job.splits(0)
    job.check(splits)
    batch = job.collate([splits["train"][index] for index in range(4)])
    answers = [job.tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]
    assert {answer.strip() for answer in answers} == {"red<|im_end|>", "blue<|im_end|>"}
    model = job.build()
    targets = job.targets_of(model)
    assert len(targets) == 7
    adapted = adapt("flora", model, [], 600, {}, target_modules=targets).model
    optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        losses.append(adapted(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("parts", "count"),
    [(["language_model"], 7), (["vision_tower"], 12), (["multi_modal_projector", "vision_tower"], 14)],
)
def test_parts_are_adapted_by_name(parts, count, tmp_path):
    job = task("", parts=parts)
    names = job.targets_of(job.build())
    assert len(names) == count and all(any(f".{part}." in name for part in parts) for name in names)


def test_a_part_may_be_trained_in_full(tmp_path):
    job = task("", parts=["language_model", "multi_modal_projector"], trained=["multi_modal_projector"])
    model = job.build()
    head, targets = job.head(model), job.targets_of(model)
    assert head == ["model.multi_modal_projector"] and len(targets) == 7
    for method in ("lora", "flora"):
        model = job.build()
        adapted = adapt(method, model, head, 600, {}, target_modules=targets).model
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert any("multi_modal_projector" in name for name in trained)
        assert all("multi_modal_projector" in name or ".language_model." in name for name in trained)
    with pytest.raises(
        ValueError, match=r"task.parts=\['resampler'\]: the model has no part 'resampler', but model.vision_tower"
    ):
        task("", parts=["resampler"]).targets_of(job.build())


@pytest.mark.parametrize("four", [False, True], ids=["bfloat16", "4bit"])
@pytest.mark.parametrize("method", ["lora", "flora", "head", "full"])
def test_what_is_trained_in_full_has_32_bits(method, four, tmp_path):
    job = task(llava(tmp_path, [row for row, _, _ in TURNS.values()] * 5), trained=["multi_modal_projector"])
    job.model = ImageTextModel(name=saved(tmp_path / "model"), dtype="bfloat16", load_in_4bit=four)
    model = job.build()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "projector" in name} == {torch.float32}
    assert dtypes["model.language_model.layers.0.mlp.up_proj.weight"] == (torch.uint8 if four else torch.bfloat16)
    if four and method in ("head", "full"):
        with pytest.raises(CannotAdapt, match="quantized"):
            adapt(method, model, job.head(model), 600, {})
        return
    adapted = adapt(method, model, job.head(model), 3000, {}, target_modules=job.targets_of(model)).model.train()
    examples = job.splits(0)["train"]
    batch = job.collate([examples[index] for index in range(4)])
    for autocast in (False, True):
        adapted.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            adapted(**batch)["loss"].backward()
        trained = [p for name, p in adapted.named_parameters() if "projector" in name and p.requires_grad]
        assert len(trained) == 4 and all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained)


LMMS_EVAL = """
import os
from pathlib import Path

def simple_evaluate(model, model_args, tasks, batch_size, cli_args):
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_FSDP"} & os.environ.keys()
    files = {file.name for file in Path(model_args.removeprefix("pretrained=")).iterdir()}
    assert model == "llava_hf" and {"config.json", "model.safetensors", "processor_config.json"} <= files
    assert Path(cli_args.output_path).is_dir()
    return {"results": {"pope": {"alias": "pope", "pope_accuracy,none": 0.75, "pope_f1_stderr,none": 0.1},
                        "mmbench_en_dev_static": {"gpt_eval_score,none": 65.0}}}
"""


def test_lmms_eval_gets_the_merged_model_in_a_process_of_its_own(tmp_path, monkeypatch):
    package = tmp_path / "lmms_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "evaluator.py").write_text(LMMS_EVAL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "2")
    manager = SimpleNamespace(TaskManager=lambda: SimpleNamespace(all_tasks=["pope", "mmbench_en_dev_static"]))
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", manager)
    job = task(llava(tmp_path), lmms_eval=["pope", "mmbench_en_dev_static"])
    job.check(job.splits(0))
    model = job.build()
    adapted = adapt("flora", model, [], 600, {}, target_modules=job.targets_of(model)).model
    numbers = {"pope pope_accuracy": 0.75, "mmbench_en_dev_static gpt_eval_score": 65.0, "average": 0.7}
    assert job.judge(adapted, None, {}, tmp_path) == {"test": pytest.approx(numbers), "notes": []}
    job.lmms_eval = ["gqa"]
    with pytest.raises(ValueError, match="lmms-eval has no task 'gqa'"):
        job.check(job.splits(0))


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_lmms_eval_measures_no_merge_that_is_quantized_anew(method, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms_eval, "evaluate", lambda model, *rest: merged.append(model.merge_and_unload()) or {})
    merged = []
    job = task(llava(tmp_path), lmms_eval=["pope"], trained=["multi_modal_projector"])
    job.model = ImageTextModel(name=saved(tmp_path / "model"), load_in_4bit=True)
    torch.manual_seed(0)
    model = job.build()
    adapted = adapt(method, model, job.head(model), 3000, {}, target_modules=job.targets_of(model)).model
    with torch.no_grad():
        for parameter in (one for one in adapted.parameters() if one.requires_grad):
            parameter.normal_(std=0.2)
    save(adapted, tmp_path / "trained")
    (note,) = job.judge(adapted, None, {}, tmp_path)["notes"]
    assert note.endswith("merged into the base model in float32, not in 4 bits")
    dense = ImageTextModel(name=job.model.name).build("AutoModelForImageTextToText")
    with_adapter = PeftModel.from_pretrained(dense, tmp_path / "trained")
    batch = job.collate([job.splits(0)["train"][0]])
    logits = [one.eval()(**batch).logits for one in (with_adapter, *merged)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)  # nf4 is off by 9 % of a weight


@pytest.mark.parametrize(("method", "asked"), [("houlsby", 0), ("full", 1)])
def test_lmms_eval_is_not_asked_about_a_model_that_it_could_not_load(method, asked, tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(lmms_eval, "evaluate", lambda model, *rest: models.append(model) or {})
    job = task(llava(tmp_path), lmms_eval=["pope"])
    model = adapt(method, job.build(), [], 3000, {}).model
    notes = job.judge(model, None, {}, tmp_path)["notes"]
    assert len(models) == asked
    assert asked or "lmms-eval was not run: it would load the model without its 24 parameters such as" in notes[0]


def test_a_processor_without_an_image_token_is_named(tmp_path, monkeypatch):
    job = task_of("qwen2_vl", tmp_path, "")
    made = SimpleNamespace(image_processor=None, tokenizer=job.tokenizer)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name: made)
    with pytest.raises(ValueError, match="qwen2_vl: its SimpleNamespace does not say which token stands for a picture"):
        job.model.load_processor()
