"""Text to image: where pictures and captions come from and what is refused, the loss, samples, quality, files."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from test_task_images import encoded
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny_pipelines as pipelines
from commands import flora
from flora_lab.methods import METHODS, CannotAdapt, adapt
from flora_lab.run.fit import Checkpoints
from flora_lab.tasks.diffusion import callbacks
from flora_lab.tasks.diffusion.captions import Captions, read_captions
from flora_lab.tasks.diffusion.denoiser import CONDITIONS, _flux
from flora_lab.tasks.diffusion.files import export
from flora_lab.tasks.diffusion.noise import FlowMatching, Noise, VariancePreserving, process_of
from flora_lab.tasks.diffusion.pipeline import Pipeline
from flora_lab.tasks.diffusion.samples import Samples
from flora_lab.tasks.text_to_image import TextToImage

SMALL = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "num_class_embeds": 3,
}  # fmt: skip


def noise_picture(seed=0, height=20, width=24):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def pictures(folder, count=8, captions="a photo of cat"):
    """A folder of pictures, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(noise_picture(number)).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(captions)
    return folder


def classes(path, labels=(0, 1, 2) * 8):
    label = datasets.ClassLabel(names=["cat", "dog", "eel"])
    columns = {"image": [{"bytes": encoded(noise_picture(n, 8, 8))} for n in range(len(labels))], "label": list(labels)}
    features = datasets.Features({"image": datasets.Image(), "label": label})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def tiny_keys(folder, job):
    """The overrides that make a text-to-image YAML run in seconds: data and a pipeline of no size in ``folder``."""
    few = ["training.batch_size=2", "training.loaders=0", "training.eval_steps=null"]
    few += ["task.samples.steps=2", "task.samples.each=1"]
    few += [f"task.quality.{key}" for key in ("clip=null", "dino=null", "fid=false", "classifier=null")]
    few += ["task.data.validation_share=0.25", "task.data.test_share=0.25"]
    if job == "digits-diffusion":
        small = [f"task.{part}.{kind}_examples=4" for part in ("data", "source") for kind in ("train", "validation")]
        config = {**SMALL, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
        return [*few, *small, "task.data.test_examples=4", f"task.model.config={json.dumps(config)}", "budget=6000"]
    if job == "cifar-diffusion":
        classes(folder / "train.parquet")
        own = [f"task.{part}.{key}" for part in ("data", "source") for key in (f"path={folder}", "size=8")]
        own += ["task.source.only=[cat]", "task.data.only=[dog]", "task.data.train_examples=4"]
        prompts = ["task.samples.prompts=[dog]", "task.samples.drift_prompts=[cat]"]
        return [*few, *own, *prompts, f"task.model.config={json.dumps(SMALL)}", "budget=6000"]
    kind = {"sd15": "sd", "sdxl-dreambooth": "sdxl", "flux-dreambooth": "flux"}[job]
    pictures(folder / "data")
    prior = [f"task.data.prior={pictures(folder / 'prior', 3)}"] if kind == "sdxl" else []
    place = [f"task.model.name={pipelines.save(kind, folder / 'pipe')}", f"task.data.path={folder / 'data'}"]
    return [*few, *place, *prior, "task.data.size=16", "task.samples.batch=4", "budget=12000"]


def task(path, size=8, config=SMALL, scheduler=None, **keys):
    data = Captions(path=str(path), size=size, test_share=0.25, validation_share=0.25, **keys.pop("data", {}))
    name = keys.pop("name", None)
    model = Pipeline(name=name and str(name), config={} if name else dict(config), scheduler=scheduler or {})
    return TextToImage(model=replace(model, **keys.pop("model", {})), data=data, **keys)


def of_classes(folder, **keys):
    classes(folder / "train.parquet")
    return task(folder, data={"caption": "label", **keys.pop("data", {})}, **keys)


# ---------------------------------------------------------------------------------------------------------------- data


def captions_in(keys, split="train"):
    splits, _ = read_captions(keys)
    return splits[split].dataset["caption"][:]


def test_captions_come_from_files_beside_pictures_from_metadata_or_from_one_prompt(tmp_path):
    folder = pictures(tmp_path / "data", 3)
    (folder / "1.txt").write_text("a dog\n")
    assert captions_in(Captions(path=str(folder))) == ["a photo of cat", "a dog", "a photo of cat"]
    assert captions_in(Captions(path=str(folder), prompt="sks")) == ["sks"] * 3
    lines = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert captions_in(Captions(path=str(folder))) == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_folder_s_metadata_may_be_a_table(tmp_path, ending):
    folder = pictures(tmp_path / "data", 3, captions=None)
    rows = datasets.Dataset.from_dict({"file_name": [f"{n}.png" for n in range(3)], "text": ["a, b", "c", "d"]})
    getattr(rows, f"to_{ending}")(folder / f"metadata.{ending}")
    (folder / "README.txt").write_text("no caption: no picture here has one of its own")
    assert captions_in(Captions(path=str(folder))) == ["a, b", "c", "d"]


def test_folders_of_splits_and_of_classes(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        pictures(tmp_path / "data" / split / "deeper", count)
    splits, names = read_captions(Captions(path=str(tmp_path / "data")))
    assert {name: len(records) for name, records in splits.items()} == {"train": 2, "validation": 1}
    assert names == ["a photo of cat"]
    for name in ("eel", "cat"):
        pictures(tmp_path / "classes" / name, 2, captions=None)
    splits, names = read_captions(Captions(path=str(tmp_path / "classes"), caption="label"))
    assert names == ["cat", "eel"] and splits["train"].dataset["caption"][:] == ["cat", "cat", "eel", "eel"]


def test_a_handful_is_learned_from_and_tested_on(tmp_path):
    job = task(pictures(tmp_path / "data", 2), config={**SMALL, "num_class_embeds": None}, data={"reuse": True})
    assert [len(examples) for examples in job.splits(0).values()] == [2, 2, 2]


def break_picture(folder):
    (folder / "2.png").write_bytes(b"no picture")


def empty(folder):
    (folder / "2.txt").write_text(" \n")


def orphan(folder):
    (folder / "2b.txt").write_text("a cat")


def table(folder):
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a cat\n1.png,\n")


def without(folder):
    (folder / "2.txt").unlink()


def all_but_one(folder):
    for number in (1, 2, 3):
        (folder / f"{number}.png").unlink()
        (folder / f"{number}.txt").unlink()


def metadata(*rows):
    def write(folder):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / "metadata.jsonl").write_text(text)

    return write


GOOD = {"file_name": "0.png", "text": "a cat"}
BAD_DATA = [
    (break_picture, {}, r"2\.png.* is not a readable image: not a picture"),
    (empty, {}, r"2\.txt: the file is empty, expected a caption"),
    (orphan, {}, r"2b\.txt: there is no picture of this name beside it"),
    (table, {}, r"metadata.csv, line 3 \(1.png\): 'text' is '', expected a caption"),
    (without, {}, r"2\.png has no caption: no metadata.jsonl \(or .csv, .parquet\) names it, there is no 2.txt beside"),
    (metadata(GOOD, {"file_name": "x.png", "text": "a"}), {}, r"metadata.jsonl, line 2: there is no .*x\.png"),
    (metadata(GOOD, "{"), {}, r"metadata.jsonl, line 2: not JSON \(Expecting"),
    (metadata(GOOD, {"file_name": "1.png"}), {}, r"line 2: expected an object with 'file_name' and 'text', got"),
    (metadata(GOOD, GOOD), {}, r"line 2: .*line 1 names 0.png too"),
    (metadata({"file_name": "0.txt", "text": "a"}), {}, r"line 1: .*0.txt is hidden, not below .*, or not a picture"),
    (metadata({"file_name": "1.png", "text": ""}), {}, r"metadata.jsonl, line 1 \(1.png\): 'text' is '', expected"),
    (
        all_but_one,
        {},
        r"data: the validation split is empty: task.data.validation_share=0.25 of 1 is below one example; raise it, "
        r"or set task.data.reuse=true, which takes all pictures for each split",
    ),
    (None, {"only": ["a whale"]}, r"no picture with caption 'a whale'"),
    (None, {"prior": "x"}, r"task.data.prior=x and task.data.prior_prompt=None: expected both or neither"),
    (None, {"prompt": " "}, r"task.data.prompt is empty"),
]


@pytest.mark.parametrize(("spoil", "keys", "message"), BAD_DATA, ids=range(len(BAD_DATA)))
def test_bad_data_are_named_before_training(tmp_path, spoil, keys, message):
    folder = pictures(tmp_path / "data", 4)
    if spoil:
        spoil(folder)
    with pytest.raises(ValueError, match=message):
        job = task(folder, name="unused", data=keys)
        job.check(job.splits(0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 9}, "task.data.size=9: expected a multiple of 2, as UNet2DModel needs it"),
        ({"samples": Samples(prompts=["cat"], steps=2000)}, "task.samples.steps=2000: .* 2000 cannot be larger"),
        ({"samples": Samples(prompts=["a whale"])}, "task.samples: 'a whale' is no class of .*, cat, dog, eel"),
        ({"config": {**SMALL, "num_class_embeds": 2}}, "num_class_embeds=2: the data have 3 captions"),
        ({"config": {**SMALL, "layer_per_block": 1}}, "UNet2DModel has no 'layer_per_block'; did you mean 'layers_per"),
        ({"scheduler": {"_class_name": "NoScheduler"}}, "_class_name=NoScheduler: diffusers has no such scheduler"),
        ({"scheduler": {"prediction": "v"}}, "task.model.scheduler: DDPMScheduler has no 'prediction'"),
        (
            {"scheduler": {"prediction_type": "flow"}},
            "task.model.scheduler={'prediction_type': 'flow'}: .*: expected epsilon",
        ),
        (
            {"scheduler": {"beta_schedule": "round"}},
            "task.model.scheduler={'beta_schedule': 'round'}: round is not implemented",
        ),
        ({"model": {"adapt": ["text_encoder"]}}, "a model by config has a unet only"),
        ({"data": {"drop": 0.5}}, "task.data.drop=0.5: a model of classes knows no empty caption"),
        (
            {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "noise": Noise(snr_gamma=5)},
            "task.noise.snr_gamma=5: flow matching",
        ),
    ],
)
def test_bad_models_are_named(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        job = of_classes(tmp_path, **keys)
        job.check(job.splits(0))
        job.build()


def test_a_pipeline_names_its_parts(tmp_path):
    folder = pipelines.save("sd", tmp_path / "pipe")
    assert Pipeline(name=str(folder), adapt=["text_encoder"]).parts() == ["unet", "text_encoder"]
    with pytest.raises(ValueError, match="has no vae, but unet, text_encoder"):
        Pipeline(name=str(folder), adapt=["vae"]).parts()
    with pytest.raises(ValueError, match="absent: no such file or folder"):
        Pipeline(name=str(tmp_path / "absent")).parts()


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [("sd", 20, "`height` and `width` have to be divisible by 8"), ("flux", 18, "expected a multiple of 4, as FluxT")],
)
def test_a_size_that_a_pipeline_does_not_make_is_refused(tmp_path, kind, size, message, capsys):
    job = task(pictures(tmp_path / "data", 2), size, name=pipelines.save(kind, tmp_path / "pipe"), data={"reuse": True})
    with pytest.raises(ValueError, match=f"task.data.size={size}: {message}"):
        job.build()
    assert "pipeline components" not in capsys.readouterr().err  # of diffusers' own bar


def test_what_is_shown_and_what_sdxl_is_told_of_it(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # the middle third
    (tmp_path / "data").mkdir()
    Image.fromarray(wide).save(tmp_path / "data" / "0.png")
    job = task(tmp_path / "data", size=10, data={"prompt": "a", "reuse": True})
    example = job.splits(0)["test"][0]
    assert example["pixel_values"].shape == (3, 10, 10) and bool((example["pixel_values"] == 1).all())
    assert example["geometry"].tolist() == [10, 30, 0, 10, 10, 10]


def test_pictures_of_the_prior_come_last_with_their_weight(tmp_path):
    keys = {"prompt": "sks cat", "prior": str(pictures(tmp_path / "prior", 2)), "prior_prompt": "a cat"}
    job = task(pictures(tmp_path / "data", 8), data={**keys, "prior_weight": 0.5})
    splits = job.splits(0)
    batch = job.collate([splits["train"][0], splits["train"][1]])
    assert batch["prompts"] == ["sks cat"] * 2 + ["a cat"] * 2 and batch["weights"].tolist() == [1, 1, 0.5, 0.5]
    assert "weights" not in job.collate([splits["test"][0]])


# ---------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_targets_and_weights_are_those_of_the_papers(kind):
    process = process_of(DDPMScheduler(prediction_type=kind))
    assert isinstance(process, VariancePreserving)
    clean, noise = torch.randn(2, 4, 3, 5, dtype=torch.float64).unbind()
    shares = torch.tensor([0.0, 0.25, 0.5, 0.9999])
    noisy, target, steps = process.mix(clean, noise, shares)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)[[0, 250, 500, 999]].view(-1, 1, 1)
    assert steps.tolist() == [0, 250, 500, 999]
    assert torch.allclose(noisy, kept.sqrt() * clean + (1 - kept).sqrt() * noise, atol=1e-5)
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]
    assert torch.allclose(target, wanted, atol=1e-5)
    # with any target the squared error of x_0 weighs min(snr, γ): ε errs by snr times as much, v by snr + 1
    snr = (kept / (1 - kept)).flatten()
    scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[kind]
    weights = process.weights(steps, 5.0).double()
    assert torch.allclose(weights * scale, snr.clamp(max=5), rtol=1e-3)
    assert process.weights(steps, None).tolist() == [1] * 4


def test_flow_matching_goes_straight_from_pictures_to_noise():
    process = process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(process, FlowMatching)
    clean, noise = torch.randn(2, 2, 4, 4, dtype=torch.float64).unbind()
    noisy, target, times = process.mix(clean, noise, torch.tensor([0.0, 0.5]))
    sigmas = torch.tensor([1.0, 3 * 0.5 / (1 + 2 * 0.5)], dtype=torch.float64).view(-1, 1, 1)
    assert torch.allclose(noisy, (1 - sigmas) * clean + sigmas * noise, atol=1e-6)
    assert torch.equal(target, noise - clean) and torch.allclose(times.double(), 1000 * sigmas.flatten(), atol=1e-3)


def test_an_offset_shifts_whole_channels():
    plain, shifted = torch.randn(64, 3, 8, 8), Noise(offset=2.0).draw(torch.zeros(64, 3, 8, 8))
    means = shifted.mean((2, 3))
    assert 1.5 < means.std() < 2.5 and abs((shifted - means[..., None, None]).std() - plain.std()) < 0.1


# ---------------------------------------------------------------------------------------------------------------- model


def batch_of(job, split="test", count=2):
    examples = job.splits(0)[split]
    return job.collate([examples[n] for n in range(count)])


def test_the_loss_is_the_squared_error_and_does_not_vary_in_evaluation(tmp_path):
    job = of_classes(tmp_path)
    model, batch = job.build().eval(), batch_of(job)
    with torch.no_grad():
        one, two = model(**batch), model(**batch)
        torch.randn(3)
        single = model(**job.collate([job.splits(0)["test"][1]]))
    assert torch.equal(one["loss"], two["loss"])
    assert torch.allclose(one["loss"], F.mse_loss(one["prediction"], one["target"]))
    assert torch.allclose(single["prediction"], one["prediction"][1:], atol=1e-5)  # by the example, not by its batch
    counts = job.reduce((one["prediction"], one["target"]), None)
    explained = job.metrics(type("P", (), {"predictions": counts.numpy()}))["explained"]
    assert explained == pytest.approx(1 - (one["loss"] / one["target"].square().mean()).item(), rel=1e-4)
    model.train()
    assert not torch.equal(model(**batch)["loss"], model(**batch)["loss"])


def test_the_model_is_told_the_class(tmp_path):
    job = of_classes(tmp_path)
    model = job.build().eval()
    x, step = torch.randn(3, 3, 8, 8), torch.tensor([5, 5, 5])
    own = model._predict(x, step, model._condition(["eel", "cat", "dog"], None))
    assert torch.equal(own, model.unet(x, step, class_labels=torch.tensor([2, 0, 1])).sample)


def test_a_model_without_classes_needs_no_captions(tmp_path):
    folder = pictures(tmp_path / "data", 4, captions=None)
    job = task(folder, config={**SMALL, "num_class_embeds": None}, data={"reuse": True})
    splits = job.splits(0)
    job.check(splits)
    assert splits["train"][0]["prompts"] == ""
    model = job.build()
    model.train()(**batch_of(job))["loss"].backward()
    made = model.sample(["anything", "else"], [0, 0], Samples(steps=2))
    assert torch.equal(made[0], made[1]) and made.isfinite().all()


@pytest.mark.parametrize("kind", sorted(pipelines.PIPELINES))
def test_a_pipeline_trains_and_samples_as_its_own_code_does(tmp_path, kind):
    """Denoising at a time is what the pipeline's own call does there; the prior's weights and gradients reach it."""
    folder = pipelines.save(kind, tmp_path / "pipe")
    adapted = ["text_encoder"] if kind == "sd" else []
    keys = {"adapt": adapted, "gradient_checkpointing": True}
    job = task(pictures(tmp_path / "data", 4), 16, name=folder, model=keys, data={"reuse": True})
    model = job.build()
    assert type(model.denoiser).__name__ in CONDITIONS
    model.train()(**batch_of(job))["loss"].backward()
    assert all(any(p.grad is not None for p in part.parameters()) for part in model.children())

    sampling = Samples(steps=2, guidance=1.0)
    before = torch.get_rng_state()
    made = model.sample(["a cat", "a dog"], [3, 4], sampling)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    whole = DiffusionPipeline.from_pretrained(folder)
    whole.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    size = {"height": 16, "width": 16, "output_type": "pt", "generator": generators}
    own = whole(["a cat", "a dog"], num_inference_steps=2, guidance_scale=1.0, **size).images
    assert made.shape == (2, 3, 16, 16) and torch.allclose(made, own, atol=1e-5)


def test_flux_sees_tokens_as_its_pipeline_packs_them():
    latents, seen = torch.randn(2, 4, 6, 8), {}

    class Transformer:
        config = type("Config", (), {"guidance_embeds": True})

        def __call__(self, tokens, **keys):
            seen.update(keys, tokens=tokens)
            return (tokens,)

    back = _flux(Transformer(), latents, torch.tensor([500.0, 250.0]), {})
    assert torch.equal(back, latents)
    assert torch.equal(seen["tokens"], FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(seen["img_ids"], FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))
    assert seen["timestep"].tolist() == [0.5, 0.25] and seen["guidance"].tolist() == [1, 1]


def test_bfloat16_weights_take_float32_pictures(tmp_path):
    folder = pipelines.save("sd", tmp_path / "pipe")
    keys = {"dtype": "bfloat16"}
    job = task(pictures(tmp_path / "data", 4), 16, name=folder, model=keys, data={"reuse": True})
    model = job.build()
    assert model.denoiser.dtype == torch.bfloat16 and model.frozen.pipeline.vae.dtype == torch.float32
    assert model(**batch_of(job))["loss"].dtype == torch.float32
    assert model.sample(["a cat"], [0], Samples(steps=1)).isfinite().all()
    assert model.frozen.pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_a_u_net_or_says_why_not(tmp_path, method):
    job = of_classes(tmp_path)
    model = job.build()
    try:
        adapted = adapt(method, model, job.head(model), 6000, {}, target_modules=job.targets_of(model))
    except CannotAdapt as error:
        assert method in {"head", "gralora", "oft", "houlsby", "pfeiffer"}, error
        return
    if adapted.start:
        adapted.start([batch_of(job, "train")])
    loss = adapted.model(**batch_of(job, "train"))["loss"]
    loss.backward()
    assert loss.isfinite() and adapted.parameters > 0


# ------------------------------------------------------------------------------------------------------------- training


class Slope(torch.nn.Module):
    """One weight, which SGD of rate 1 raises by 1 per step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        return {"loss": -self.weight * x.mean(), "prediction": x}


class Weights(TrainerCallback):
    """The weight after each step, and the one that each evaluation sees."""

    def __init__(self):
        self.trained, self.evaluated = [], {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.trained.append(model.weight.item())

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated[state.global_step] = model.weight.item()


def trained(folder, interval, *added):
    """A slope after three epochs of four steps, evaluated after each epoch or ``interval``."""
    args = TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=1, learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", optim="sgd", use_cpu=True, report_to="none", disable_tqdm=True,
        eval_strategy="steps" if interval else "epoch", save_strategy="no", **interval,
    )  # fmt: skip
    data, model = [{"x": torch.ones(1), "labels": 0}] * 4, Slope()
    Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=list(added)).train()
    return model


@pytest.mark.parametrize(("interval", "due"), [({}, (4, 8, 12)), ({"eval_steps": 3}, (3, 6, 9, 12))])
def test_the_average_is_evaluated_and_kept_and_the_last_weights_train_on(tmp_path, interval, due):
    weights = Weights()  # the first callback, so that it sees an evaluation's weights before they are put back
    model = trained(tmp_path, interval, weights, callbacks.Averaging(0.9))
    averages, average = {}, 0.0
    for step in range(1, 13):
        decay = min(0.9, step / (9 + step)) if step > 1 else 0.0  # diffusers' start: early weights count less
        average = averages[step] = decay * average + (1 - decay) * step
    assert weights.trained == [*range(12)]
    assert weights.evaluated == pytest.approx({step: averages[step] for step in due})
    assert model.weight.item() == pytest.approx(average) and average != 12


@pytest.mark.parametrize(
    ("interval", "due"),
    [({}, {1: 4, 2: 8, 3: 12}), ({"eval_steps": 3}, {1: 6, 2: 9, 3: 12}), ({"eval_steps": 8}, {2: 8, 3: 12})],
)
def test_an_epoch_s_pictures_are_made_at_the_first_evaluation_after_it(tmp_path, interval, due, monkeypatch):
    def plain(model):
        return SimpleNamespace(sample=lambda *_: (model.weight / 255).detach().expand(1, 1, 2, 2))

    monkeypatch.setattr(callbacks, "plain", plain)
    trained(tmp_path, interval, callbacks.SampleEpochs(Samples(prompts=["a"]), tmp_path))
    made = {path.parent.name: np.unique(Image.open(path)).item() for path in tmp_path.rglob("*.png")}
    assert made == {f"epoch-{epoch}": step for epoch, step in due.items()}


def test_an_interrupted_training_goes_on_with_its_average_and_the_same_noise(tmp_path, monkeypatch):
    shipped = Path(__file__).parents[2] / "configs" / "cifar-diffusion.yaml"
    job = yaml.safe_load(shipped.read_text())
    job["methods"] = {"flora": job["methods"]["flora"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    keys = [*tiny_keys(tmp_path, shipped.stem), "pretraining.max_steps=2", f"cache={tmp_path / 'cache'}"]
    keys += ["task.samples.every_epoch=true", "task.data.mirror=true", "training.epochs=3", "training.max_steps=null"]
    keys.append("training.eval_steps=3")  # an epoch has two: it goes on within the second

    def train(name):
        return flora("train", tmp_path / "job.yaml", *keys, f"output={tmp_path / name}")

    assert train("whole").exit_code == 0
    ended, end = itertools.count(1), Checkpoints.on_epoch_end

    def interrupt(self, args, *rest, **kwargs):
        end(self, args, *rest, **kwargs)
        if next(ended) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_epoch_end", interrupt)
        assert train("stopped").exit_code == 130
    assert len(list((tmp_path / "stopped" / "flora" / "checkpoints").glob("*/average.safetensors"))) == 1
    assert train("stopped").exit_code == 0
    one, two = (json.loads((tmp_path / name / "results.jsonl").read_text()) for name in ("whole", "stopped"))
    for key in ("test", "validation", "curve", "samples"):
        assert one[key] == two[key]
    pictures = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png")}
    assert {path.parts[-2] for path in pictures if len(path.parts) > 1} == {
        "epoch-1", "epoch-3", "final", "base"
    }  # fmt: skip
    weights = [load_file(tmp_path / name / "flora/trained/adapter_model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("kind", "method"), [("sd", "flora"), ("sd", "lora"), ("sdxl", "flora"), ("flux", "flora")])
def test_files_of_a_trained_adapter_load_where_they_are_for(tmp_path, kind, method):
    """diffusers' own loader, and LyCORIS' for the file of ComfyUI, make the pictures of the adapted model."""
    from flora.convert.verification import FORMS

    folder = pipelines.save(kind, tmp_path / "pipe")
    keys = {"adapt": ["text_encoder"] if kind == "sd" else []}
    job = task(pictures(tmp_path / "data", 4), 16, name=folder, model=keys, data={"reuse": True})
    model = job.build()
    adapted = adapt(method, model, [], 16_000, {}, target_modules=job.targets_of(model)).model
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "trained")
    out = tmp_path / "export"
    assert export(tmp_path / "trained", job.model.parts(), out) == []
    sampling, prompts = Samples(steps=2, guidance=1.0), ["a cat", "a dog"]
    made, base = model.sample(prompts, [3, 4], sampling), job.build().sample(prompts, [3, 4], sampling)
    assert (made - base).abs().max() > 1e-3

    def sampled(whole):
        whole.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        keys = {"height": 16, "width": 16, "output_type": "pt", "generator": generators, "guidance_scale": 1.0}
        return whole(prompts, num_inference_steps=2, **keys).images

    whole = DiffusionPipeline.from_pretrained(folder)
    whole.load_lora_weights(out / "diffusers", use_safetensors=True)
    assert torch.allclose(sampled(whole), made, atol=1e-4)
    whole = DiffusionPipeline.from_pretrained(folder)
    for part in job.model.parts():
        FORMS["locon"](getattr(whole, part), str(out / "comfyui.safetensors"))
    assert torch.allclose(sampled(whole), made, atol=1e-4)


def test_what_has_no_file_says_why(tmp_path):
    (tmp_path / "full").mkdir()
    assert export(tmp_path / "full", ["unet"], tmp_path / "export") == []
    folder = pipelines.save("sd", tmp_path / "pipe")
    job = task(pictures(tmp_path / "data", 4), 16, name=folder, data={"reuse": True})
    for method, reason in (("dora", "use_dora=True"), ("flora", None), ("loha", None)):
        adapted = adapt(method, job.build(), [], 500, {}, target_modules=["unet.conv_in", "unet.conv_out"]).model
        adapted.save_pretrained(tmp_path / method)
        notes = export(tmp_path / method, ["unet"], tmp_path / f"{method}-export")
        assert (reason in notes[0]) if reason else notes == []
        assert (tmp_path / f"{method}-export").exists() == (method == "flora")


def test_a_layer_without_a_form_is_named(tmp_path):
    model = of_classes(tmp_path).build()
    adapt("flora", model, [], 500, {}, target_modules=["unet.class_embedding"]).model.save_pretrained(tmp_path / "one")
    notes = export(tmp_path / "one", ["unet"], tmp_path / "export")
    assert [note.split(":")[0] for note in notes] == ["no file diffusers", "no file comfyui.safetensors"]
    assert all("class_embedding" in note and f"{tmp_path / 'export' / 'unet'}: " in note for note in notes)
    assert (tmp_path / "export" / "unet" / "adapter_model.safetensors").exists()
