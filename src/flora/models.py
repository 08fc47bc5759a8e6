"""A model from a folder or the hub, of transformers or diffusers: its structure alone, or with its weights; and inputs
to try it with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora.files import local_path, read_json


def empty_model(name: str) -> nn.Module:
    """The model on the meta device, from its config alone, as the class that the config names."""
    return _build(name, weights=False)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with its weights, ready to be run."""
    return _build(name, weights=True).to(dtype).eval()


def _build(name: str, weights: bool) -> nn.Module:
    """Raises ValueError where ``name`` is no model of either library."""
    source = str(local_path(name) or name)
    try:
        return (_diffusers if _is_diffusers(source) else _transformers)(source, weights)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error


def _is_diffusers(name: str) -> bool:
    path = Path(name) / "config.json"
    return path.is_file() and "_class_name" in read_json(path)


def _transformers(name: str, weights: bool) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    if not weights:
        return _on_meta(config)
    return (_class_of(config) or transformers.AutoModel).from_pretrained(name, dtype=torch.float32)


def _class_of(config: Any) -> type | None:
    import transformers

    return getattr(transformers, (config.architectures or [""])[0], None)


def _on_meta(config: Any) -> nn.Module:
    import transformers

    cls = _class_of(config)
    build = transformers.AutoModel.from_config if cls is None else cls._from_config
    with torch.device("meta"):
        return build(config, attn_implementation="eager")


def _diffusers(name: str, weights: bool) -> nn.Module:
    import diffusers

    kind = getattr(diffusers, read_json(Path(name) / "config.json")["_class_name"])
    if weights:
        return kind.from_pretrained(name)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(name))


def quiet() -> None:
    """Leave the screen to our own bars, tables and errors."""
    import warnings

    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PEFT 0.21 reads a property that transformers 5 has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def meta_model(path: Path) -> nn.Module | None:
    """The model that a config.json describes, on the meta device; None where transformers knows no such.

    Raises:
        ValueError: naming ``path``, where it can't be built.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = read_json(path).get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    try:
        return _on_meta(CONFIG_MAPPING[kind].from_pretrained(str(path)))
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(f"{path}: transformers can't build the model, to learn its weights' names: {error}") from error


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


# -------------------------------------------------------------------------------------------------- inputs to try it


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Random inputs of one batch, by the names of the model's forward.

    Raises ValueError where they are not known for its class.
    """
    accepted = inspect.signature(model.forward).parameters
    first = getattr(model, "main_input_name", "sample")
    names = [first] if first in INPUTS else []
    config = model.config
    if first == "input_ids" and "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and "input_ids" in accepted:
        names = ["input_ids", "pixel_values"] if first == "input_ids" and "projection_dim" in config else names
    if first == "sample" and "timestep" in accepted:
        names += [name for name in ("timestep", "encoder_hidden_states") if name in accepted]
    if not names:
        raise ValueError(f"no inputs are known for {type(model).__name__}; compare the two in Python")
    dtype = next(model.parameters()).dtype
    inputs = {name: INPUTS[name](config) for name in names}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _part(config: Any, kind: str) -> Any:
    return getattr(config, f"{kind}_config", config)


def _tokens(config: Any) -> Tensor:
    text = _part(config, "text")
    return torch.randint(3, text.vocab_size, (2, min(12, getattr(text, "max_position_embeddings", 12))))


def _pixels(config: Any) -> Tensor:
    vision = _part(config, "vision")
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(2, getattr(vision, "num_channels", 3), height, width)


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
