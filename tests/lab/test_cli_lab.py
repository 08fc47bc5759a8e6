"""The laboratory's commands: what they accept, and that every mistake is one line that names it, with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from commands import assert_refused, flora
from flora_lab.loading import build_config, with_key
from flora_lab.settings import Training, Variant

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sed=1", "sed"),
        ("training.epoch=3", "training.epoch: no such key; did you mean 'epochs'?"),
        ("methods.lora.rate=3", "methods.lora.rate: no such key, expected some of method, learning_rate, options"),
        ("task.data.angle=3", "task.data.angle: no such key"),
        ("task.data.size={a: 1}", "task.data.size={'a': 1}: expected a whole number or null"),
        ("training.epochs=many", "training.epochs=many: expected a whole number"),
        ("training.epochs=2.5", "training.epochs=2.5: expected a whole number"),
        ("training.epochs=null", "training.epochs=null: expected a whole number"),
        ("comparison.seeds=3", "comparison.seeds=3: expected a list, each a whole number"),
        ("comparison.rates=[1,a]", "comparison.rates[1]=a: expected a number"),
        ("training.epochs=0", "training.epochs=0: expected at least 1"),
        ("training.epochs=[1", "training.epochs=[1"),
        ("training.max_steps=0", "training.max_steps=0: expected at least 1"),
        ("training.learning_rate=0", "training.learning_rate=0.0: expected a number above 0"),
        ("methods.lora.learning_rate=-1", "methods.lora.learning_rate=-1.0: expected a number above 0"),
        ("training.learning_rate=nan", "training.learning_rate=nan"),
        ("training.learning_rate=inf", "training.learning_rate=inf"),
        ("training.mixed_precision=int8", "training.mixed_precision=int8: expected one of no, bf16, fp16"),
        ("training=3", "training: "),
        ("seed=-1", "seed=-1"),
        ("fresh=maybe", "fresh=maybe: expected true or false"),
        ("budget=0", "budget=0"),
        ("methods.prompt.learning_rate=1", "prompt: expected some of full, head, bitfit, houlsby"),
        ("methods=3", "methods"),
        ("methods.mine.method=lorra", "methods.mine.method=lorra: expected one of full, head"),
        ("task.model=gpt2", "task.model: expected keys and their values, got 'gpt2'"),
        ("task.name=ocr", "task.name=ocr: expected one of image_classification, glue"),
        ("task=ocr", "task.name=ocr"),
        ("task=[1]", "task=[1]: "),
        ("task.data.rotate=45", "task.data.rotate=45: expected one of 0, 90, 180, 270"),
        ("task.data.classes=[3,3]", "task.data.classes=[3, 3]"),
        ("task.data.classes=[3,10]", "task.data.classes=[3, 10]: digits has no class 10"),
        ("task.data.classes=[3]", "task.data.classes=[3]: expected two or more"),
        ("task.data.test_share=1", "task.data.test_share=1.0: expected a share"),
        ("task.model.config.depths=[1]", "task.model.config.model_type=convnextv2: "),
        ("task.data.mean=[0.5,0.5]", "task.data.mean=[0.5, 0.5] and task.data.std=[0.5]: expected one or three"),
        ("task.data.path=./none", "task.data.path=./none: no such file or folder"),
        ("task.source.path=./none", "task.source.path=./none: no such file or folder"),
        ("task.model.weights=none.safetensors", "task.model.weights=none.safetensors is not a whole safetensors file"),
        ("task.model.name=a", "Error: task.model: a model is given by name or config, got name=a and config={"),
        ("task.source.test_share=1", "Error: task.source.test_share=1.0: expected a share"),
        ("task.source.classes=[3,10]", "Error: task.source.classes=[3, 10]: digits has no class 10"),
        ("seed=${nothing}", "seed"),
        ("=3", "=3"),
        ("seed", "seed: expected key=value"),
        # what only the methods know, and still before anything is trained
        ("methods.flora.options.init=magic", "methods.flora: init"),
        ("methods.flora.options.rang=4", "methods.flora: "),
        ("methods.flora.options.lora_alpha=4", "'lora_alpha'; did you mean 'scale'?"),
        ("methods.lora.options.lora_alfa=4", "'lora_alfa'; did you mean 'lora_alpha'?"),
        ("budgt=3", "'budget'"),
        ("output=", "output"),
        ("output=true", "output=true: expected a path"),
        ("--output", "--output: expected a value, as in output=VALUE"),
        ("--training.epochs", "--training.epochs: expected a value"),
        ("seed=" + "[" * 9000, "seed=[["),
        ("methods.flora.options.r=0", "methods.flora: r"),
        ("methods.full.options.r=4", "methods.full: "),
    ],
)
def test_a_bad_key_or_value_is_one_line(override, named, tmp_path):
    result = flora("train", DIGITS, f"output={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", override)
    assert_refused(result, named)
    assert not list(tmp_path.iterdir()), "nothing is written before the keys are known to be good"


def test_a_model_that_cannot_be_loaded_is_told_with_its_key(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "task: {name: image_classification, model: {name: ./gone}}\nmethods: {lora: {}}"
    )
    result = flora("train", tmp_path / "config.yaml", f"output={tmp_path / 'run'}")
    assert result.stderr.splitlines() == ["Error: task.model.name=./gone: no such file or folder"]


SCENES = {"name": "semantic_segmentation", "data": {"classes": 3}}
UPERNET = "task.model.config.model_type=upernet"
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
DECODER = {"backbone": {"config": RESNET}}


@pytest.mark.parametrize(
    ("task", "message", "key"),
    [
        ({"name": "image_classification", "model": {"name": "o/net"}}, "o/net: no weights", "task.model.name="),
        ({"name": "semantic_segmentation", "backbone": {"name": "o/net"}}, "o/net: no", "task.backbone.name="),
        ({"name": "text_to_image", "data": {"prior": "./a", "prior_prompt": "b"}}, "./a: no", "task.data.prior="),
        ({"name": "language", "data": {"path": "o/rows"}}, "'o/rows' is not a file or folder here", "task.data.path="),
        ({"name": "language", "data": {"path": "./rows/"}}, "rows: no file that ends in", "task.data.path="),
        ({"name": "image_classification", "data": {"path": "./a"}}, "./a.png: not a picture", ""),
    ],
)
def test_a_message_gets_the_key_of_the_value_that_it_begins_with(task, message, key):
    config = build_config({"task": task, "methods": {"lora": {}}})
    assert with_key(config, ValueError(message)) == key + message


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "image_classification"}, "task.model: a model is given by name or config, got name=None and"),
        ({"name": "text_to_image"}, "task.model: a model is given by name or config, got name=None and"),
        ({"name": "oriented_detection"}, "task.backbone: a model is given by name or config, got name=None and"),
        ({"name": "language"}, "task.model: a model is given by name or config, got name=None and"),
        (
            {"name": "language", "model": {"config": {"vocab_size": 9}}},
            "task.model.config={'vocab_size': 9}: expected a",
        ),
        ({"name": "language", "model": {"config": {"model_type": "lama"}}}, "task.model.config.model_type=lama: "),
        ({**SCENES, "model": {}}, "task.model: a model is given by name or config"),
        ({**SCENES, "model": {"name": "a/b", "weights": "w"}}, "task.model.weights=w: a named model (a/b) has its own"),
        (
            {**SCENES, "model": {"config": {"model_type": "upernet", "hiden_size": 8}}},
            f"{UPERNET}: UperNetConfig has no",
        ),
        ({**SCENES, "backbone": {}}, "task.backbone: a model is given by name or config"),
        (
            {**SCENES, "backbone": {"config": {"depths": [1]}}},
            "task.backbone.config={'depths': [1]}: expected a model_type",
        ),
        ({**SCENES, "backbone": {"config": {"model_type": "resnett"}}}, "task.backbone.config.model_type=resnett: "),
        (
            {**SCENES, **DECODER, "model": {"config": {"hiden_size": 8}}},
            "task.model.config: UperNetConfig has no 'hiden_size'; ",
        ),
        ({**SCENES, **DECODER, "model": {"config": {"pool_scales": 8}}}, "task.model.config: "),
        (
            {**SCENES, **DECODER, "model": {"config": {"model_type": "upernett"}}},
            "task.model.config.model_type=upernett: ",
        ),
        ({**SCENES, **DECODER, "model": {"weights": "none.safetensors"}}, "task.model.weights=none.safetensors is not"),
    ],
)
def test_a_fault_of_a_model_is_told_with_its_key(task, message):
    config = build_config({"task": task, "methods": {"lora": {}}})
    with pytest.raises(ValueError) as error:
        config.task.build()
    assert with_key(config, error.value).startswith(message)


SLOW = "(.?){1,60}(.?.?){1,60}(.?.?.?){1,60}Z"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (f"target_modules={SLOW}", "Error: "),
        (f"methods.lora.options.exclude_modules={SLOW}", "methods.lora: "),
        (f"methods.lora.options.rank_pattern={{'{SLOW}': 3}}", "methods.lora: "),
    ],
    ids=["target_modules", "exclude_modules", "rank_pattern"],
)
def test_a_pattern_that_never_ends_is_one_line(override, named, tmp_path, monkeypatch):
    monkeypatch.setattr("flora.keys.PATTERN_SECONDS", 0.3)
    result = flora("train", DIGITS, f"output={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", override)
    assert_refused(result, f"{named}matching target_modules, exclude_modules and the other patterns takes too long")


def test_an_empty_section_keeps_its_defaults():
    keys = {
        "task": {"name": "image_classification"},
        "training": None,
        "methods": {"lora": None, "flora": {"options": None}},
    }
    config = build_config(keys)
    assert config.training == Training() and config.methods == {"lora": Variant(), "flora": Variant()}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("task: {name: image_classification}\nmethods: [1", "config.yaml"),
        ("- 1\n- 2\n", "config.yaml: expected keys"),
        ("just words", "just words: "),
        ("", "task.name: expected one of image_classification"),
        ("task: {name: image_classification}", "methods=None"),
        ("\x00", "config.yaml"),
        ("seed: " + "[" * 9000, "config.yaml"),
    ],
)
def test_a_bad_file_is_one_line(text, named, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert_refused(flora("train", tmp_path / "config.yaml"), named)


def test_a_missing_file_is_one_line(tmp_path):
    assert_refused(flora("train", tmp_path / "none.yaml"), "none.yaml: No such file or directory")
    assert_refused(flora("train", tmp_path), "Is a directory")


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(flora("train", DIGITS, f"output={tmp_path / 'file' / 'run'}"), "file")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = flora("train", DIGITS, f"output={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}")
    assert_refused(result, "sklearn.datasets is not installed: pip install 'flora-peft[train]'")


HELP = [[*words.split(), "--help"] for words in ("", "plan", "export lora", "merge", "train", "compare", "analyse")]


@pytest.mark.parametrize("arguments", [*HELP, ["train", DIGITS, "budgt=3"]], ids=" ".join)
def test_help_and_typos_wait_for_no_heavy_package(arguments):
    code = (
        "import sys\nfrom flora.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-200:]


@pytest.mark.parametrize("command", ["train", "compare", "plan"])
@pytest.mark.parametrize("option", ["--output", "--output=x"])
def test_a_forgotten_first_argument_is_one_line(command, option):
    first = "MODEL" if command == "plan" else "CONFIG"
    result = flora(command, option)
    assert_refused(result, f"{option}: {first} comes first, as in `", f"{command} {first} output=VALUE`")


def test_an_unknown_command_names_the_nearest():
    assert_refused(flora("trian"), "no such command 'trian'; did you mean 'train'?")


def test_ctrl_c_says_that_the_next_start_goes_on(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("flora_lab.run.train.train", interrupted)
    result = flora("train", DIGITS, f"output={tmp_path / 'run'}")
    assert (
        result.exit_code == 130
        and result.stderr == "Error: interrupted: the next start goes on where this one stopped\n"
    )


@pytest.mark.parametrize("command", ["train", "compare", "analyse"])
def test_help(command):
    result = flora(command, "--help")
    assert result.exit_code == 0 and not result.stderr


def test_help_lists_every_key():
    help_text = flora("train", "--help").output
    for key in (
        "seed",
        "training.learning_rate",
        "methods.NAME.options",
        "task.data.rotate",
        "comparison.seeds",
        "task.subset",
    ):
        assert f"  {key} " in help_text
