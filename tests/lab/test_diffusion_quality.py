"""How pictures are judged and shown: similarities, Fréchet distances, the grid of the report."""

import base64
import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_task_text_to_image import SMALL, of_classes
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import tiny_pipelines as pipelines
from flora_lab import lines
from flora_lab.analysis import fields, figures
from flora_lab.analysis.results import summarise
from flora_lab.tasks.diffusion import quality as judging
from flora_lab.tasks.diffusion.judges import MEAN, STD, Classifier
from flora_lab.tasks.diffusion.quality import Quality, _frechet
from flora_lab.tasks.diffusion.samples import Samples, image, judge_samples
from flora_lab.tasks.models.pretrained import Pretrained

VIT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
       "patch_size": 8, "num_labels": 3}  # fmt: skip
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """A CLIP and a DINO of no size, in folders."""
    folder = tmp_path_factory.mktemp("judges")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2, "projection_dim": 8}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    shapes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessor(**shapes), pipelines.tokenizer()).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**{k: v for k, v in sizes.items() if k != "intermediate_size"}, image_size=8,
                             patch_size=4)).save_pretrained(folder / "dino")  # fmt: skip
    CLIPImageProcessor(**shapes).save_pretrained(folder / "dino")
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(folder / "bare")
    ResNetModel(ResNetConfig(**RESNET)).save_pretrained(folder / "resnet")
    CLIPImageProcessor(**shapes).save_pretrained(folder / "resnet")
    return folder


def test_similarities_are_mean_cosines(tmp_path, judges):
    job = of_classes(tmp_path)
    examples = job.splits(0)["test"]
    quality = Quality(clip=str(judges / "clip"), dino=str(judges / "dino"))
    made = torch.rand(3, 3, 8, 8)
    prompts = ["a cat", "a photo of dog", "a"]
    numbers = quality.of_prompts(made, prompts, examples)
    model, processor = quality._clip_model
    inputs = processor(text=prompts, images=list(made), return_tensors="pt", padding=True, do_rescale=False)
    cosines = model(**inputs).logits_per_image.diag() / model.logit_scale.exp()
    assert numbers["CLIP-T"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert set(numbers) == {"CLIP-T", "CLIP-I", "DINO"} and all(-1 <= value <= 1 for value in numbers.values())
    assert quality.drift(made, made)["drift DINO"] == pytest.approx(0, abs=1e-5)
    lost = quality.of_prompts(made * math.nan, prompts, examples)
    assert set(lost) == set(numbers) and all(map(math.isnan, lost.values()))


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("dino", "absent", "=.*absent: "),
        ("dino", "clip", "=.*clip: "),
        ("dino", "resnet", "=.*resnet: ResNetModel has no class token"),
        ("clip", "vit", "=.*vit: "),
        ("clip", "absent", "=[^:]*absent: no such file or folder"),
        ("dino", "absent", "=[^:]*absent: no such file or folder"),
        ("classifier", "absent", ": [^:]*absent: no such file or folder"),
        ("classifier", "bare", ": .*bare"),  # without an image processor
        ("classifier", {"model_type": "vit", **VIT}, r": Input image size \(8\*8\) doesn't match model \(16\*16\)"),
        ("classifier", {"model_type": "vit", **VIT, "num_labels": 0}, ": ViTForImageClassification has no linear"),
    ],
)
def test_a_judge_that_can_not_judge_is_named_before_training(tmp_path, judges, key, given, message):
    named = str(judges / given) if isinstance(given, str) else None
    judge = named if key != "classifier" else Pretrained(name=named, config={} if named else given)
    job = of_classes(tmp_path, quality=Quality(**{key: judge}))
    with pytest.raises(ValueError, match=f"^task.quality.{key}{message}"):
        job.check(job.splits(0))


def test_judges_of_their_own_sizes_judge_small_grey_pictures(tmp_path, judges):
    clip, dino, vit = (str(judges / name) for name in ("clip", "dino", "vit"))
    quality = Quality(clip, dino, classifier=Pretrained(name=vit), images=3)
    job = of_classes(tmp_path, config={**SMALL, "in_channels": 1, "out_channels": 1}, quality=quality)
    splits = job.splits(0)
    job.check(splits)
    numbers = quality.of_prompts(torch.rand(2, 1, 8, 8), ["a", "a cat"], splits["test"])
    numbers |= quality.of_data(job.build(), splits["test"], Samples(steps=1))
    assert set(numbers) == {"CLIP-T", "CLIP-I", "DINO", "FD", "recognised"}
    assert all(map(math.isfinite, numbers.values()))


def test_a_classifier_sees_pictures_as_its_own_processor_makes_them(judges):
    judge, pictures = Classifier(Pretrained(name=str(judges / "vit"))), torch.rand(2, 3, 8, 8)
    seen = ViTImageProcessor.from_pretrained(judges / "vit")([image(one) for one in pictures], return_tensors="pt")
    assert seen["pixel_values"].shape == (2, 3, 16, 16)
    expected = ViTForImageClassification.from_pretrained(judges / "vit").eval()
    assert torch.allclose(judge(pictures), expected.vit(**seen).last_hidden_state[:, 0], atol=1e-6)
    names = ["first", "second", "third"]
    assert judge.classes(pictures, names) == [names[n] for n in expected(**seen).logits.argmax(-1).tolist()]


def test_a_classifier_with_names_tells_the_classes_of_the_data_by_them():
    labels = {0: "tench, Tinca", 1: "dog", 2: "Cat"}
    judge = Classifier(Pretrained(config={**CLASSIFIER, "id2label": labels}))
    assert judge.named(["cat", "Tinca"]) == ["Tinca", "dog", "cat"]
    with pytest.raises(ValueError, match="^it has no class 'bird' of the data; its own: tench, Tinca, dog, Cat$"):
        judge.named(["cat", "bird"])
    assert Classifier(Pretrained(config=CLASSIFIER)).named(["a", "b", "c"]) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="^it has no class 'a' of the data; its own: LABEL_0, LABEL_1, LABEL_2$"):
        Classifier(Pretrained(config=CLASSIFIER)).named(["a"])


def test_a_classifier_s_output_layer_may_be_within_another():
    judge = Classifier(Pretrained(config={"model_type": "resnet", **RESNET}))
    assert judge(torch.rand(2, 3, 32, 32)).shape == (2, 6) and judge.num_features == 6


def test_inception_is_loaded_before_training_or_never(tmp_path, monkeypatch):
    def absent(*arguments, **keys):
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", absent)
    job = of_classes(tmp_path, quality=Quality(fid=True))
    with pytest.raises(ValueError, match="task.quality.fid: Inception can't be loaded: no network"):
        job.check(job.splits(0))


CLASSIFIER = {"model_type": "cifar_resnet", "depth": 8, "widths": [4, 4, 6], "num_labels": 3}


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    from scipy.linalg import sqrtm

    real, made = torch.rand(2, 40, 3, 8, 8).unbind()
    features = Classifier(Pretrained(config=CLASSIFIER))
    a, b = (features(x).detach().double().numpy() for x in (real, made))
    assert a.shape == (40, 6)
    between = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * sqrtm(np.cov(a.T) @ np.cov(b.T)).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + between
    distance = _frechet(features)
    for some, is_real in ((real, True), (made[:25], False), (made[25:], False)):
        distance.update(some, real=is_real)
    assert distance.compute().item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_no_more_pictures_are_held_than_are_judged_at_a_time(monkeypatch):
    monkeypatch.setattr(judging, "BATCH", 3)
    held = [0]

    class Data(list):
        def __getitem__(self, index):
            held[0] += 1
            return {"pixel_values": torch.zeros(1, 2, 2)}

        def caption(self, index):
            return "a"

    class Distance:
        reset, compute, judged = staticmethod(int), staticmethod(lambda: torch.zeros(())), []

        def update(self, some, real):
            assert held[0] == len(some) <= 3 and some.shape[1] == 3
            self.judged.append(real)
            held[0] = 0

    def pictures(captions, seeds, keys):
        for index in seeds:
            yield Data()[index]["pixel_values"]

    named, asked = Classifier.named, []
    monkeypatch.setattr(Classifier, "named", lambda self, known: asked.append(known) or named(self, known))
    quality = Quality(classifier=Pretrained(config=CLASSIFIER), images=7)
    vars(quality)["_distance"] = Distance()
    model = SimpleNamespace(frozen=SimpleNamespace(classes=["a", "b", "c"]), pictures=pictures)
    assert quality.of_data(model, Data([0] * 5), Samples()).keys() == {"FD", "recognised"}
    assert sorted(Distance.judged) == [False] * 3 + [True] * 2
    assert asked == [["a", "b", "c"]], "the classes' names are looked up once"


def test_pictures_of_the_data_are_counted_by_what_a_classifier_sees(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lines, "PATIENCE", 0.0)
    quality = Quality(classifier=Pretrained(config=CLASSIFIER), images=6)
    job = of_classes(tmp_path, quality=quality)
    examples, model = job.splits(0)["test"], job.build()
    numbers = quality.of_data(model, examples, Samples(steps=1))
    captions = [examples.caption(n % len(examples)) for n in range(6)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    made = model.sample(captions, range(6), Samples(steps=1))
    shown, count = capsys.readouterr().err, len(examples)
    assert "sampling 6/6 00:00 left" in shown and f"judging {count}/{count} 00:00 left" in shown
    seen = quality._seen.model((made - mean) / std).logits.argmax(-1).tolist()
    hits = [job.classes[label] == caption for label, caption in zip(seen, captions, strict=True)]
    assert numbers["recognised"] == pytest.approx(np.mean(hits))
    assert numbers["FD"] > 0
    torch.nn.init.constant_(model.unet.conv_out.bias, math.nan)
    assert all(map(math.isnan, quality.of_data(model, examples, Samples(steps=1)).values()))


def test_a_model_that_has_learned_nothing_does_not_drift(tmp_path):
    keys = Samples(prompts=["cat"], drift_prompts=["dog", "eel"], each=2, steps=2)
    job = of_classes(tmp_path, samples=keys)
    model = job.build()
    row = judge_samples(model, model, job.splits(0)["test"], job, tmp_path / "samples")
    assert row["test"] == {"drift": 0} and row["samples"]["images"] == row["samples"]["base"]
    assert (
        row["samples"]["prompts"] == ["cat", "cat", "dog", "dog", "eel", "eel"]
        and row["samples"]["seeds"] == [0, 1] * 3
    )
    names = sorted(path.name for path in (tmp_path / "samples" / "final").iterdir())
    assert names[:3] == ["00-cat-0.png", "01-cat-1.png", "02-dog-0.png"]
    made = np.asarray(Image.open(tmp_path / "samples" / "final" / names[0]))
    wanted = model.sample(["cat"], [0], keys)[0].permute(1, 2, 0) * 255
    assert np.abs(made - wanted.numpy()).max() <= 0.51
    torch.nn.init.constant_(model.unet.conv_out.bias, math.nan)
    lost = judge_samples(model, job.build(), job.splits(0)["test"], job, tmp_path / "samples")
    assert math.isnan(lost["test"]["drift"])


# ----------------------------------------------------------------------------------------------------------- the report


def jpeg(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def row(variant, value, **samples):
    numbers = {"explained": 0.5}
    shown = {"prompts": ["a cat", "a cat", "a dog"], "images": [jpeg(value)] * 3, "base": [jpeg(0)] * 3, **samples}
    return {
        "job": "j", "metric": "explained", "variant": variant, "method": variant, "budget": 100, "seed": 0,
        "learning_rate": 0.1, "validation": numbers, "test": numbers, "adapter_parameters": 100, "head_parameters": 0,
        "samples": shown,
    }  # fmt: skip


def test_the_report_has_a_grid_of_prompts_and_methods():
    rows = [row("lora", 100), row("flora", 200)]
    (picture,) = [one for one in figures.pictures(summarise(rows)) if one.name == "pictures"]
    (axes,) = picture.chart.axes
    assert len(axes.images) == 9  # the base model and two methods, three pictures each
    reds = [np.asarray(image.get_array())[0, 0, 0] for image in axes.images]
    assert np.abs(np.array(reds) - np.repeat([0, 100, 200], 3)).max() < 8
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["base model", "LoRA", "FLoRA", "a cat", "a dog"]
    assert picture.svg().count("<image") == 9
    del rows[0]["samples"], rows[1]["samples"]
    assert "pictures" not in [one.name for one in figures.pictures(summarise(rows))]


@pytest.mark.parametrize("value", [3, {"prompts": ["a"]}, {"prompts": ["a"], "images": ["?"], "base": [jpeg(0)]},
                                   {"prompts": ["a"], "images": [jpeg(0)] * 2, "base": [jpeg(0)]}])  # fmt: skip
def test_samples_that_are_none_are_named(value):
    with pytest.raises(ValueError, match=re.escape("f, line 1: samples=")):
        fields.check(row("lora", 0) | {"samples": value}, "f, line 1")
