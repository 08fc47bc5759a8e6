"""From a trained adapter of a pipeline to files that diffusers and ComfyUI read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flora.files import CONFIG, new_folder, read_json

DIFFUSERS, COMFYUI = "diffusers", "comfyui.safetensors"


def export(trained: Path, parts: Sequence[str], out: Path) -> list[str]:
    """Write an adapter, FLoRA's or PEFT's LoRA, in every form that it has: OUT/PART for PEFT, one adapter per part of
    the pipeline; OUT/diffusers for ``pipeline.load_lora_weights``; OUT/comfyui.safetensors for ComfyUI.

    Returns notes: which form there is not, and why. Methods of other kinds have none.
    """
    from flora.convert import export_diffusers, export_locon, import_lora

    kind = read_json(trained / CONFIG).get("peft_type") if (trained / CONFIG).is_file() else None
    if kind not in ("FLORA", "LORA"):
        return []
    shutil.rmtree(out, ignore_errors=True)
    notes = []
    with new_folder(out) as folder, tempfile.TemporaryDirectory() as temporary:
        if kind == "LORA":
            try:
                import_lora(trained, Path(temporary, "flora"))
            except ValueError as error:  # DoRA, or a start that has changed the base
                return [f"no file for diffusers or ComfyUI: {' '.join(str(error).split())}"]
            trained = Path(temporary, "flora")
        adapters = {part: folder / part for part in parts if _split(trained, part, folder / part)}
        main, *encoders = adapters
        others = {name: adapters[name] for name in encoders if name in ("text_encoder", "text_encoder_2")}
        for write, place, keys in (
            (export_diffusers, folder / DIFFUSERS, {"component": main}),
            (export_locon, folder / COMFYUI, {}),
        ):
            try:
                write(adapters[main], place, **keys, **others)
            except ValueError as error:
                reason = " ".join(str(error).split()).replace(str(folder), str(out))
                notes.append(f"no file {place.name}: {reason}")
    return notes


def _split(adapter: Path, part: str, out: Path) -> bool:
    """Write the updates of one part of the pipeline as an adapter of that part alone. Whether there are some."""
    from flora.convert.adapter import Adapter, write_adapter

    source, below = Adapter.open(adapter), f"{part}."
    updates = (update for update in source.updates() if update.site.module.startswith(below))
    own = [
        replace(update, site=replace(update.site, module=update.site.module.removeprefix(below))) for update in updates
    ]
    if own:
        out.mkdir()
        config = replace(source.config)
        config.target_modules = [update.site.module for update in own]
        write_adapter(out, config, own)
    return bool(own)
