"""GLUE: what is read of its files, what is refused, how it is judged; with a tiny model and tokenizer from a folder."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from flora_lab.tasks.glue import SUBSETS, Glue, Sentences
from flora_lab.tasks.models.pretrained import Pretrained

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", '"', "cats", "dogs", "chase", "sleep", "rarely", "0", "1", "2"]
TINY = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OFFICIAL = {  # headers as the benchmark's own files have them; CoLA's have none
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "sst2": "sentence label",
    "cola": None,
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}
LABELS = {
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "stsb": ["0.5", "2.0", "5.000"],
}


def tsv(subset, count=24):
    """An official TSV: row i has the texts '"cats chase {i % 3}' and "dogs sleep", and the i-th label in turn."""
    header = OFFICIAL[subset] and OFFICIAL[subset].split("|" if "|" in OFFICIAL[subset] else " ")
    lines = [header] if header else []
    for i in range(count):
        labels = LABELS.get(subset, ["0", "1"])
        label, first, second = labels[i % len(labels)], f'"cats chase {i % 3}', "dogs sleep"
        if subset == "cola":
            lines.append(["gj04", label, "*", first])
            continue
        texts = dict(zip(SUBSETS[subset].tsv[:-1], (first, second), strict=False))
        lines.append([{**texts, SUBSETS[subset].tsv[-1]: label}.get(name, f"{name}{i}") for name in header])
    return "".join("\t".join(line) + "\n" for line in lines)


def tiny_data(folder, subset):
    folder.mkdir()
    (folder / "train.tsv").write_text(tsv(subset), encoding="utf-8-sig")
    (folder / f"dev{'_matched' if subset == 'mnli' else ''}.tsv").write_text(tsv(subset, 12))
    return folder


def tiny_model(folder, model=None):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    (model or BertModel(BertConfig(**TINY))).save_pretrained(folder)
    return folder


def tiny_keys(folder, subset):
    """Overrides with which a GLUE config runs on next to nothing; ``test_train`` uses them too."""
    model, data = tiny_model(folder / "model"), tiny_data(folder / "data", subset)
    return [f"task.model.name={model}", f"task.data.path={data}", "budget=600"]


def task_of(folder, subset, **keys):
    data = Sentences(path=str(tiny_data(folder / "data", subset)), **keys)
    return Glue(subset=subset, model=Pretrained(name=str(tiny_model(folder / "model"))), data=data)


# ------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("subset", SUBSETS)
def test_official_files_are_read_as_they_are(subset, tmp_path):
    task = task_of(tmp_path, subset)
    splits = task.splits(0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 22, "validation": 2, "test": 12}
    pair = " [SEP] dogs sleep" if len(SUBSETS[subset].hub) == 2 else ""
    names = LABELS.get(subset, ["0", "1"])
    for i in range(12):
        example = splits["test"][i]
        assert task.tokenizer.decode(example["input_ids"]) == f'[CLS] " cats chase {i % 3}{pair} [SEP]'
        assert example["labels"] == (float(names[i % 3]) if subset == "stsb" else i % len(names))
        assert (
            splits["test"].name(i) == f"{tmp_path}/data/dev{SUBSETS[subset].dev}.tsv, line {i + 1 + (subset != 'cola')}"
        )
    lines = {split.name(i) for split in splits.values() for i in range(len(split))}
    assert len(lines) == 36


def test_validation_is_drawn_from_train_by_the_seed_and_dev_is_the_test_split(tmp_path):
    task = task_of(tmp_path, "cola", validation_share=0.5)
    names = [[split.name(i) for i in range(len(split))] for s in (0, 0, 1) for split in [task.splits(s)["validation"]]]
    assert names[0] == names[1] != names[2] and all("train.tsv" in name for name in names[0])
    assert all("dev.tsv" in task.splits(0)["test"].name(i) for i in range(12))


def test_a_batch_is_padded_to_its_longest(tmp_path):
    task = task_of(tmp_path, "stsb")
    examples = [{"input_ids": [2, 6, 3], "attention_mask": [1] * 3, "labels": 0.5}]
    examples += [{"input_ids": [2, 6, 8, 7, 3], "attention_mask": [1] * 5, "labels": 2.0}]
    batch = task.collate(examples)
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0], [2, 6, 8, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].dtype == torch.float32


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("blank", [0, 1, 2])
def test_sst2_without_a_header_and_files_with_windows_line_ends_and_blank_last_lines(end, blank, tmp_path):
    task = task_of(tmp_path, "sst2")
    for name in ("train", "dev"):
        lines = [b"cats chase\t1", b"dogs sleep\t0"] * 8 + [b""] * blank
        (tmp_path / "data" / f"{name}.tsv").write_bytes(end.join([*lines, b""]))
    test = task.splits(0)["test"]
    assert len(test) == 16 and [test[i]["labels"] for i in (0, 1)] == [1, 0]


def test_the_hub_is_asked_for_the_subset_and_matched_dev(tmp_path, monkeypatch):
    import datasets

    def load(path, subset, split):
        asked.append((path, subset, split))
        labels = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        features = {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"), "label": labels}
        rows = {"premise": ["cats"] * 30, "hypothesis": ["dogs"] * 30, "label": [i % 3 for i in range(29)] + [last]}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    asked, last = [], 1
    monkeypatch.setattr(datasets, "load_dataset", load)
    model = Pretrained(name=str(tiny_model(tmp_path / "model")))
    splits = Glue(subset="mnli", model=model).splits(0)
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    assert len(splits["test"]) == 30 and splits["test"][5]["labels"] == 2
    last = -1
    with pytest.raises(ValueError, match=r"nyu-mll/glue, train, row 29: label -1; expected 0 to 2"):
        Glue(subset="mnli", model=model).splits(0)
    with pytest.raises(ValueError, match="nyu-mll/glue, train has no column 'sentence'"):
        Glue(subset="sst2", model=model).splits(0)


BAD = {
    "columns": (
        "rte",
        "index\tpremise\n",
        r"train.tsv, line 1: expected the columns sentence1, sentence2, label; found 'index', 'premise'",
    ),
    "no header": ("cola", "cats\t1\n", r"train.tsv, line 1: expected the columns sentence, label; found 'cats', '1'"),
    "old line ends": ("sst2", "sentence\tlabel\rcats\t1\rdogs\t0\r", r"line 1: expected .*; found .*'label.rcats'"),
    "only line ends": ("cola", "\r\n\n", r"train.tsv is empty"),
    "a blank line between": ("cola", "a\t1\t\tcats\n\nb\t0\t\tdogs\n", r"train.tsv, line 2: 1 fields, expected 4"),
    "few fields": ("cola", "a\t1\t\tcats\nb\t0\n", r"train.tsv, line 2: 2 fields, expected 4 .*skip_broken"),
    "many fields": ("sst2", "sentence\tlabel\ncats\tdogs\t1\n", r"train.tsv, line 2: 3 fields, expected 2"),
    "no file content": ("cola", "", r"train.tsv is empty"),
    "no rows": ("rte", "sentence1\tsentence2\tlabel\n", r"data: the train split is empty"),
    "class": ("cola", "a\t2\t\tcats\n", r"train.tsv, line 1: label '2'; expected 0, 1"),
    "class name": (
        "rte",
        "sentence1\tsentence2\tlabel\ncats\tdogs\tmaybe\n",
        r"line 2: label 'maybe'; expected entail",
    ),
    "score": (
        "stsb",
        "sentence1\tsentence2\tscore\ncats\tdogs\tnan\n",
        r"line 2: score 'nan'; expected a number from 0",
    ),
    "range": (
        "stsb",
        "sentence1\tsentence2\tscore\ncats\tdogs\t5.1\n",
        r"line 2: score '5.1'; expected a number from 0",
    ),
    "text": ("sst2", "cats\t1\n \t0\n", r"train.tsv, line 2: no text"),
    "texts": ("rte", "sentence1\tsentence2\tlabel\n\t\tentailment\n", r"line 2: no text"),
    "encoding": ("cola", b"a\t1\t\tcats\nb\t0\t\tcat\xe9\n", r"train.tsv, line 2: .*; expected UTF-8"),
    "a class of dev alone": ("cola", "a\t1\t\tcats\n" * 20, r"dev.tsv, line 1: label '0' is not in the train split"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named_by_file_and_line(case, tmp_path):
    subset, content, message = BAD[case]
    task = task_of(tmp_path, subset)
    (tmp_path / "data" / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        task.splits(0)


def test_broken_lines_are_left_out_where_asked_and_one_of_two_texts_may_be_empty(tmp_path):
    task = task_of(tmp_path, "qqp", skip_broken=True)
    with (tmp_path / "data" / "dev.tsv").open("a") as file:
        file.write("9\t1\t2\tcats\n9\t1\t2\tcats\t\t1\n")
    test = task.splits(0)["test"]
    assert len(test) == 13 and task.tokenizer.decode(test[12]["input_ids"]) == "[CLS] cats [SEP] [SEP]"
    assert test.name(12).endswith("dev.tsv, line 15")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": Sentences(path="./nowhere")}, r"\./nowhere: no such file or folder"),
        ({"data": Sentences(path="{folder}")}, r"train.tsv: No such file"),
        ({"data": Sentences(path="{folder}/data", max_length=1000)}, r"max_length=1000: .* reads up to 512 tokens"),
        ({"model": Pretrained(config={"model_type": "bert"})}, r"task.model.name=None: expected a folder or a name"),
        ({"model": Pretrained(name="{folder}/none")}, r"none has no tokenizer"),
    ],
)
def test_what_is_not_there_is_named(keys, message, tmp_path):
    task = task_of(tmp_path, "cola")
    BertConfig().save_pretrained(tmp_path / "none")
    if "data" in keys:
        keys["data"].path = keys["data"].path.format(folder=tmp_path)
    elif keys["model"].name:
        keys["model"].name = keys["model"].name.format(folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        Glue(**{"subset": "cola", "model": task.model, "data": task.data, **keys}).splits(0)


def test_an_unknown_subset_is_refused():
    with pytest.raises(ValueError, match="task.subset=wnli: expected one of mnli, sst2"):
        Glue(subset="wnli")


# --------------------------------------------------------------------------------------------- text against the model


def family(name, positions=16, words=14):
    """A tiny model of a family of its own way with positions."""
    sizes = {**TINY, "max_position_embeddings": positions, "vocab_size": words}
    relative = {"relative_attention": True, "position_biased_input": False, "max_relative_positions": 4}
    return {
        "bert": lambda: BertModel(BertConfig(**sizes)),
        "roberta": lambda: RobertaModel(RobertaConfig(**sizes, pad_token_id=0)),  # its first position is 1
        "deberta-v3": lambda: DebertaV2Model(DebertaV2Config(**sizes, **relative)),
        "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**sizes)),
        "gpt2": lambda: GPT2Model(
            GPT2Config(n_positions=positions, vocab_size=words, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
        ),
    }[name]()


def of_length(folder, model, tokens):
    """A job whose longest text, with [CLS] and [SEP], is of so many tokens."""
    job = Glue(subset="sst2", model=Pretrained(name=str(tiny_model(folder / "model", model))))
    job.data = Sentences(path=str(folder), max_length=tokens)
    for name, longest in (("train", 2), ("dev", tokens - 2)):
        lines = [f"{'cats ' * longest}\t{i % 2}\n" for i in range(12)]
        (folder / f"{name}.tsv").write_text("".join(["dogs\t1\n", *lines]))
    return job


@pytest.mark.parametrize(
    ("name", "positions"), [("bert", 16), ("roberta", 15), ("deberta-v3", 40), ("deberta-v2", 16), ("gpt2", 16)]
)
def test_a_text_with_more_tokens_than_the_model_has_positions(name, positions, tmp_path):
    for tokens in (positions, positions + 1):
        place = tmp_path / str(tokens)
        place.mkdir()
        job = of_length(place, family(name), tokens)
        splits = job.splits(0)
        if tokens == positions or name == "deberta-v3":
            job.check(splits)
            job.build()(**job.collate([splits["test"][1]]))
        else:
            said = rf"dev.tsv, line 2: .* {tokens} tokens .*max_position_embeddings is 16.*max_length={tokens}"
            with pytest.raises(ValueError, match=said):
                job.check(splits)


def test_a_token_that_the_model_has_no_embedding_of(tmp_path):
    job = task_of(tmp_path, "cola")
    (tmp_path / "small").mkdir()
    small = family("bert", words=len(WORDS) - 1).save_pretrained
    small(tmp_path / "model")
    job.check(of_length(tmp_path / "small", family("bert", words=len(WORDS) - 1), 8).splits(0))  # it uses none of those
    with pytest.raises(ValueError, match=r"line \d+: has token 13 of the tokenizer's 14; .*model has 13 only"):
        job.check(job.splits(0))


# ------------------------------------------------------------------------------------------------------------ model


def test_the_head_is_drawn_from_the_seed_even_if_the_checkpoint_has_one(tmp_path):
    saved = BertForSequenceClassification(BertConfig(**TINY)).to(torch.bfloat16)
    task = Glue(subset="cola", model=Pretrained(name=str(tiny_model(tmp_path / "model", saved))))
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(task.build())
    first, again, other = (model.classifier.weight for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first.bfloat16(), saved.classifier.weight)
    assert task.head(models[0]) == ["classifier"] and first.dtype == torch.float32
    for name, parameter in models[0].bert.named_parameters():
        assert torch.equal(parameter, saved.bert.get_parameter(name).float())


def test_debertas_pooler_belongs_to_the_head(tmp_path):
    model = Pretrained(name=str(tiny_model(tmp_path / "model", DebertaV2Model(DebertaV2Config(**TINY)))))
    task = Glue(subset="mnli", model=model)
    built = task.build()
    assert task.head(built) == ["pooler", "classifier"] and built.classifier.out_features == 3


@pytest.mark.parametrize("subset", ["stsb", "mnli"])
def test_the_loss_is_the_tasks(subset, tmp_path):
    task = task_of(tmp_path, subset)
    examples = task.splits(0)["test"]
    batch = task.collate([examples[i] for i in range(5)])
    out = task.build().eval()(**batch)
    if subset == "stsb":
        expected = ((out.logits[:, 0] - batch["labels"]) ** 2).mean()
    else:
        expected = -out.logits.log_softmax(-1)[range(5), batch["labels"]].mean()
    torch.testing.assert_close(out["loss"], expected)


# ---------------------------------------------------------------------------------------------------------- metrics


def test_of_a_model_with_further_outputs_the_logits_are_judged():
    logits, labels = torch.randn(4, 2), torch.zeros(4)
    assert Glue.reduce((logits, torch.randn(4, 9, 8)), labels) is Glue.reduce(logits, labels) is logits


def measured(subset, predictions, labels):
    return Glue(subset=subset).metrics(SimpleNamespace(predictions=np.array(predictions), label_ids=np.array(labels)))


def test_metrics_are_those_of_the_paper():
    one_hot = np.eye(2)[[1, 1, 0, 1, 0, 0, 1, 1]]
    labels = [1, 1, 0, 0, 0, 1, 1, 0]
    cells = Counter(zip(one_hot.argmax(-1), labels, strict=True))
    tp, fp, fn, tn = cells[1, 1], cells[1, 0], cells[0, 1], cells[0, 0]
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert measured("cola", one_hot, labels) == {"matthews": pytest.approx(matthews)}
    for subset in ("qqp", "mrpc"):
        assert measured(subset, one_hot, labels) == {
            "accuracy": 5 / 8,
            "f1": pytest.approx(2 * tp / (2 * tp + fp + fn)),
        }
    for subset in ("mnli", "sst2", "qnli", "rte"):
        assert measured(subset, one_hot, labels) == {"accuracy": 5 / 8}
    scores, truth = np.array([[0.1], [2.0], [1.0], [9.0]]), [0.0, 1.0, 2.0, 5.0]
    found = measured("stsb", scores, truth)
    assert found["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], truth)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([0, 2, 1, 3], [0, 1, 2, 3])[0, 1])
    assert [Glue(subset=name).metric for name in ("cola", "stsb", "qqp")] == ["matthews", "pearson", "accuracy"]


def test_a_model_that_always_says_the_same_has_no_correlation():
    assert measured("cola", [[0.0, 1.0]] * 4, [0, 1, 1, 0]) == {"matthews": 0}
    assert measured("mrpc", [[1.0, 0.0]] * 4, [0, 1, 1, 0]) == {"accuracy": 0.5, "f1": 0}
    assert measured("stsb", [[2.0]] * 4, [0.0, 1.0, 2.0, 3.0]) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_model_that_diverged_has_no_metric(lost):
    found = [measured(subset, [[1.0, 0.0]] * 3 + [[lost, 0.0]], [0, 1, 1, 0]) for subset in ("cola", "mrpc", "rte")]
    found.append(measured("stsb", [[1.0], [2.0], [lost]], [0.0, 1.0, 2.0]))
    assert all(math.isnan(value) for one in found for value in one.values())
