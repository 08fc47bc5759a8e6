"""What accelerate needs to shard any model of a task."""

from __future__ import annotations

from torch import nn


def prepare_to_shard(model: nn.Module) -> None:
    """Give a model what accelerate asks it for: the classes of its blocks, and its embeddings, None for pictures.

    transformers knows both for language models, but not for an UperNet, or for a model of ours around one of its own.
    """
    blocks = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    model._no_split_modules = sorted(blocks & {type(module).__name__ for module in model.modules()})
    try:
        model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        model.get_input_embeddings = _no_embeddings


def _no_embeddings() -> None:
    return None
