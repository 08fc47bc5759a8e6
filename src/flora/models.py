"""Models of transformers and diffusers, from a folder or the hub, and example inputs to run them on."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flora.files import local_path, read_json

TIMM = "timm/"


def empty_model(name: str) -> nn.Module:
    """The model on the meta device: its structure, as the class that its config names. No weights are read.

    Args:
        name: a folder, a name on the hub (models of diffusers: a folder), or "timm/NAME", for which the hub is not
            asked if timm is installed. See ``flora.files.local_path``.

    Raises:
        ValueError: if transformers or diffusers cannot build it.
    """
    return _build(name, weights=False)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with its weights, in evaluation mode.

    Args:
        name: as ``empty_model``'s.

    Raises:
        ValueError: if transformers or diffusers cannot load it.
    """
    return _build(name, weights=True).to(dtype).eval()


def _build(name: str, weights: bool) -> nn.Module:
    source = str(local_path(name) or name)
    try:
        return (_diffusers if _is_diffusers(source) else _transformers)(source, weights)
    except Exception as error:  # a model's own code may raise anything, given a config that is wrong
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, (OSError, ValueError)) and reason else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {kind}{reason}") from error


def _is_diffusers(name: str) -> bool:
    path = Path(name) / "config.json"
    return path.is_file() and "_class_name" in read_json(path)


def _transformers(name: str, weights: bool) -> nn.Module:
    import transformers

    if not weights and (architecture := timm_architecture(name)):
        return _on_meta(transformers.AutoConfig.for_model("timm_wrapper", architecture=architecture))
    name = hub_name(name)
    config = transformers.AutoConfig.from_pretrained(name)
    if not weights:
        return _on_meta(config)
    return (_class_of(config) or transformers.AutoModel).from_pretrained(name, dtype=torch.float32)


def timm_architecture(name: str) -> str | None:
    """timm's name of the model "timm/NAME", without the tag of its weights. None for another model, or without timm."""
    if not name.startswith(TIMM) or find_spec("timm") is None:
        return None
    import timm

    known: Any = timm.models.get_pretrained_cfg(name.removeprefix(TIMM))
    return None if known is None else known.architecture


def hub_name(name: str) -> str:
    """The name on the hub: of timm/resnet18, say, the one with timm's default weights, timm/resnet18.a1_in1k. Any other
    name is returned as it is."""
    if "." in name or timm_architecture(name) is None:
        return name
    import timm

    known: Any = timm.models.get_pretrained_cfg(name.removeprefix(TIMM))
    return known.hf_hub_id or name


def _class_of(config: Any) -> Any:
    """The class that the config names, None if transformers has no such class."""
    import transformers

    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is not None and not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"architectures={config.architectures}: not a model of transformers")
    return cls


def _on_meta(config: Any) -> nn.Module:
    import transformers

    cls = _class_of(config)
    build = transformers.AutoModel.from_config if cls is None else cls._from_config
    with torch.device("meta"):
        return build(config, attn_implementation="eager")


def _diffusers(name: str, weights: bool) -> nn.Module:
    import diffusers

    class_name = read_json(Path(name) / "config.json")["_class_name"]
    cls: Any = getattr(diffusers, class_name, None)
    if diffusers.ModelMixin not in getattr(cls, "__mro__", ()):
        raise ValueError(f"_class_name={class_name!r}: not a model of diffusers")
    if weights:
        return cls.from_pretrained(name)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(name))


def quiet() -> None:
    """Silence the log messages and progress bars of other packages: the command line prints its own.

    To be called before PEFT and diffusers are imported: they import packages for quantisation where there are some.
    """
    import logging
    import warnings

    for name in ("torch.utils._pytree", "torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PEFT 0.21 reads a property that transformers 5 has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def meta_model(path: Path) -> nn.Module | None:
    """The model that a ``config.json`` describes, on the meta device. None if transformers does not know its type.

    Raises:
        ValueError: naming ``path``, if transformers cannot build the model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = read_json(path).get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        return _on_meta(CONFIG_MAPPING[model_type].from_pretrained(str(path)))
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(f"{path}: transformers cannot build this model: {error}") from error


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


# ------------------------------------------------------------------------------------------------------- example inputs


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """One batch of random inputs, by the argument names of the model's forward.

    Raises:
        ValueError: if the inputs of the model's class are not known here.
    """
    accepted = inspect.signature(model.forward).parameters
    first = getattr(model, "main_input_name", "sample")
    names = [first] if first in INPUTS else []
    config: Any = model.config
    if first == "input_ids" and "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and "input_ids" in accepted:
        names = ["input_ids", "pixel_values"] if first == "input_ids" and "projection_dim" in config else names
    if first == "sample" and "timestep" in accepted:
        names += [name for name in ("timestep", "encoder_hidden_states") if name in accepted]
    if not names:
        raise ValueError(f"the inputs of a {type(model).__name__} are not known here; compare the outputs in Python")
    dtype = next(model.parameters()).dtype
    inputs: dict[str, Any] = {name: INPUTS[name](config) for name in names}
    if "added_cond_kwargs" in accepted and getattr(config, "addition_embed_type", None) == "text_time":
        inputs["added_cond_kwargs"] = _text_and_sizes(config)
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def _config_of(config: Any, modality: str) -> Any:
    """The text or vision part of a config, or the config itself if it has no parts."""
    return getattr(config, f"{modality}_config", config)


def _tokens(config: Any) -> Tensor:
    text = _config_of(config, "text")
    return torch.randint(3, text.vocab_size, (2, min(12, getattr(text, "max_position_embeddings", 12))))


def _pixels(config: Any) -> Tensor:
    vision = _config_of(config, "vision")
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(2, getattr(vision, "num_channels", 3), height, width)


def _text_and_sizes(config: Any) -> dict[str, Tensor]:
    """What SDXL's U-Net is told besides: a pooled text, and six sizes of the picture."""
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"text_embeds": torch.randn(2, width), "time_ids": torch.full((2, 6), 64)}


def _latents(config: Any) -> Tensor:
    size = config.sample_size or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(2, config.in_channels, height, width)


INPUTS: dict[str, Callable[[Any], Any]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _pixels,
    "sample": _latents,
    "timestep": lambda config: torch.tensor([10, 500]),
    "encoder_hidden_states": lambda config: torch.randn(2, 8, config.cross_attention_dim),
}
