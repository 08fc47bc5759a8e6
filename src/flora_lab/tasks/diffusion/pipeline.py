"""A task's diffusion model: a pipeline of diffusers from a folder or the hub, or a U-Net from a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any

from flora.files import local_path
from flora_lab.errors import SectionError
from flora_lab.tasks.models.pretrained import brief

if TYPE_CHECKING:
    from torch import nn

    from flora_lab.tasks.diffusion.denoiser import Denoiser, Frozen
    from flora_lab.tasks.diffusion.noise import FlowMatching, Noise, VariancePreserving

DTYPES = ("float32", "bfloat16", "float16")
NAMES = ("unet", "transformer")  # of a pipeline's denoiser
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that no training needs


@dataclass
class Pipeline:
    name: str | None = field(
        default=None, metadata={"help": "a pipeline of diffusers: a folder, or a name on the hub", "path": True}
    )
    config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "instead of a name: the fields of a UNet2DModel, which sees pixels"}
    )
    scheduler: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of the noise scheduler to change, such as prediction_type, and its _class_name"},
    )
    adapt: list[str] = field(
        default_factory=list,
        metadata={"help": "parts to adapt: unet or transformer, text_encoder, text_encoder_2; default: the first"},
    )
    dtype: str = field(default="float32", metadata={"help": "of the base model's weights", "choices": DTYPES})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, more time"})

    def check(self) -> None:
        """Raise ValueError if the keys do not name exactly one model."""
        if (self.name is None) == (not self.config):
            given = f"got name={self.name} and config={self.config}"
            raise SectionError(self, "", f"a model is given by name or config, {given}")
        if find_spec("diffusers") is None:
            raise ValueError("diffusers is not installed: pip install 'flora-peft[diffusion]'")

    def source(self) -> str:
        """The folder, or the name on the hub. Raises ValueError if it is a folder that does not exist."""
        return str(local_path(self.name) or self.name)

    def classes(self) -> dict[str, tuple[str, str]]:
        """(library, class) of each part of the pipeline. Raises ValueError naming the model."""
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(self.source())
        except Exception as error:  # of the hub's and diffusers' many classes
            raise ValueError(f"{self.name}: {brief(error, self.name)}") from error
        return {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}

    def parts(self) -> list[str]:
        """The parts to adapt, the denoiser first. Raises ValueError for a part that the pipeline does not have."""
        from flora_lab.tasks.diffusion.denoiser import CONDITIONS

        if self.name is None:
            if self.adapt not in ([], ["unet"]):
                raise ValueError(f"task.model.adapt={self.adapt}: a model by config has a unet only")
            return ["unet"]
        classes = self.classes()
        main = next((name for name in NAMES if name in classes), None)
        kind = classes[main][1] if main else "a pipeline without denoiser"
        if kind not in CONDITIONS or kind == "UNet2DModel":
            known = [name for name in CONDITIONS if name != "UNet2DModel"]
            raise ValueError(f"{self.name}: no training is known for {kind}, but for {', '.join(known)}")
        encoders = [name for name in classes if name.startswith("text_encoder")]
        if wrong := [name for name in self.adapt if name not in (main, *encoders)]:
            raise ValueError(f"task.model.adapt: {self.name} has no {wrong[0]}, but {', '.join((main, *encoders))}")
        return [main, *(name for name in encoders if name in self.adapt)]

    def frozen(self, classes: Sequence[str]) -> Frozen:
        """What no method trains. ``classes``: the captions, for a model of classes. Raises ValueError naming it."""
        from flora_lab.tasks.diffusion.denoiser import Frozen, cast

        self.check()
        if self.name is None:
            return Frozen(None, self._scheduled({"_class_name": "DDPMScheduler"})[1], classes)
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        present = self.classes()
        absent = dict.fromkeys([*self.parts(), *(name for name in UNUSED if name in present)])
        try:
            pipeline = DiffusionPipeline.from_pretrained(self.source(), dtype=getattr(torch, self.dtype), **absent)
        except Exception as error:  # a model's own code may raise anything
            raise ValueError(f"{self.name}: {brief(error, self.name)}") from error
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        cast(pipeline.vae, torch.float32)
        given = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
        pipeline.scheduler, process = self._scheduled(given)
        return Frozen(pipeline, process)

    def build(self, frozen: Frozen, noise: Noise, size: int) -> Denoiser:
        """The model, with new weights if it is given by config. Raises ValueError naming it."""
        from flora_lab.tasks.diffusion.denoiser import Denoiser

        model = Denoiser({name: self._part(name) for name in self.parts()}, frozen, noise, size)
        _check_size(model)
        if self.gradient_checkpointing:
            for part in model.children():
                next(getattr(part, name) for name in CHECKPOINTING if hasattr(part, name))()
        embedded = getattr(getattr(model.denoiser, "class_embedding", None), "num_embeddings", None)
        if self.name is None and embedded is not None and embedded < len(frozen.classes):
            raise ValueError(
                f"task.model.config.num_class_embeds={embedded}: the data have {len(frozen.classes)} captions"
            )
        return model

    def _part(self, name: str) -> nn.Module:
        import diffusers
        import torch
        import transformers

        from flora_lab.tasks.diffusion.denoiser import cast

        dtype = getattr(torch, self.dtype)
        if self.name is None:
            _check_fields(diffusers.UNet2DModel, self.config, "task.model.config")
        try:
            if self.name is None:
                return cast(diffusers.UNet2DModel(**self.config), dtype)
            library, kind = self.classes()[name]
            cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
            return cls.from_pretrained(self.source(), subfolder=name, dtype=dtype)
        except Exception as error:  # a model's own code may raise anything
            raise ValueError(f"{self.name or 'task.model.config'}: {brief(error, self.name)}") from error

    def _scheduled(self, given: dict[str, Any]) -> tuple[Any, VariancePreserving | FlowMatching]:
        """The noise scheduler of a config, with the keys' changes, and its process. Raises ValueError naming them."""
        import diffusers

        from flora_lab.tasks.diffusion.noise import process_of

        fields = {**given, **self.scheduler}
        kind = str(fields.pop("_class_name"))
        cls = getattr(diffusers, kind, None)
        if not hasattr(cls, "add_noise") and not hasattr(cls, "scale_noise"):
            raise ValueError(f"task.model.scheduler._class_name={kind}: diffusers has no such scheduler")
        own = {name: value for name, value in self.scheduler.items() if name != "_class_name"}
        _check_fields(cls, own, "task.model.scheduler")
        try:
            scheduler = cls.from_config({name: value for name, value in fields.items() if not name.startswith("_")})
            return scheduler, process_of(scheduler)
        except Exception as error:  # a scheduler's own code may raise anything
            what = f"task.model.scheduler={self.scheduler}" if self.scheduler else self.name
            raise ValueError(f"{what}: {brief(error)}") from error


def check_steps(frozen: Frozen, steps: int) -> None:
    """Raise ValueError if no picture can be made in so many steps."""
    pipeline = frozen.pipeline
    sampler = pipeline.scheduler if pipeline else frozen.process.sampler()
    if pipeline and getattr(sampler.config, "use_dynamic_shifting", False):
        return  # the pipeline sets the times itself
    try:
        sampler.set_timesteps(steps)
    except Exception as error:  # of each scheduler's own
        raise ValueError(f"task.samples.steps={steps}: {brief(error)}") from error


def _check_size(model: Denoiser) -> None:
    """Raise ValueError if the model can't make pictures of its size."""
    pipeline, config, kind = model.frozen.pipeline, model.denoiser.config, type(model.denoiser).__name__
    if pipeline is None:
        unit = 2 ** (len(config.down_block_types) - 1)
    else:  # FLUX's pipeline, not its transformer, makes one token of two by two latents
        patch = 2 if kind == "FluxTransformer2DModel" else getattr(config, "patch_size", 1)
        unit = pipeline.vae_scale_factor * patch
    if model.size % unit:
        raise ValueError(f"task.data.size={model.size}: expected a multiple of {unit}, as {kind} needs it")
    if pipeline is not None:  # some ask for more
        needed = [name for name, key in signature(pipeline.check_inputs).parameters.items() if key.default is key.empty]
        try:
            pipeline.check_inputs(**dict.fromkeys(needed) | {"prompt": "", "height": model.size, "width": model.size})
        except ValueError as error:
            raise ValueError(f"task.data.size={model.size}: {brief(error)}") from error


# of diffusers, of transformers, and of transformers before version 5.23
CHECKPOINTING = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")


def _check_fields(cls: Any, fields: dict[str, Any], key: str) -> None:
    """Raise ValueError, naming ``key``, for a field that the class does not have."""
    from flora.text import did_you_mean

    known = list(signature(cls.__init__).parameters)[1:]
    for name in fields:
        if name not in known:
            raise ValueError(f"{key}: {cls.__name__} has no {name!r}{did_you_mean(name, known)}")
