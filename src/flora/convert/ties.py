"""Tied weights that a merge makes unequal: the model's config has to untie them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flora.convert.merged_model import MergedModel
from flora.files import read_json
from flora.models import meta_model, shared_parameters

TIE = "tie_word_embeddings"


def untie(model: MergedModel, folder: Path | None) -> None:
    """Write the base's ``config.json`` to ``folder``, changed so that the model's ``untied`` weights are not tied.

    Args:
        folder: the merged model's; None if it is a single file.

    Raises:
        ValueError: naming the weights, if the config cannot untie them.
    """
    base = model.base
    for group in model.untied:
        head = f"{' and '.join(group)} are one tied weight of {base.source}, and would no longer be equal; "
        if base.model is None or base.folder is None or folder is None:
            raise ValueError(
                f"{head}only the config.json of a transformers model's folder can untie them: merge that to a folder"
            )
        # for an encoder-decoder the flag also changes the computation
        if len(group) > 2 or base.model.config.is_encoder_decoder:
            raise ValueError(f"{head}this model requires the tie: leave these weights out of the adapter")
        config = folder / "config.json"
        content = {**_without_tie(read_json(base.folder / "config.json")), TIE: False}
        config.write_text(json.dumps(content, indent=2) + "\n")
        untied = meta_model(config)
        if untied is None or shared_parameters(untied):
            raise ValueError(f"{head}{TIE}=False does not untie this model: leave these weights out of the adapter")


def _without_tie(content: dict[str, Any]) -> dict[str, Any]:
    """The config without any flag that ties embeddings, in nested configs too."""
    return {
        key: _without_tie(value) if isinstance(value, dict) else False if key == TIE else value
        for key, value in content.items()
    }
