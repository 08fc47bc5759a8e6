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

    Returns notes: which file there is not, and why. Other kinds of adapters have no files.
    """
    kind = read_json(trained / CONFIG).get("peft_type") if (trained / CONFIG).is_file() else None
    if kind not in ("FLORA", "LORA"):
        return []
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        if kind == "LORA":
            from flora.convert import import_lora

            try:
                import_lora(trained, Path(temporary, "flora"))
            except ValueError as error:  # DoRA, or a start that has changed the base
                return [f"no file for diffusers or ComfyUI: {_line(error)}"]
            trained = Path(temporary, "flora")
        with new_folder(out) as folder:
            adapters = {part: folder / part for part in parts if _split(trained, part, folder / part)}
            return [note.replace(str(folder), str(out)) for note in _export(adapters, folder)]


def _export(adapters: dict[str, Path], folder: Path) -> list[str]:
    """Write the files of a pipeline's adapters, by part. The notes."""
    from flora.convert import export_diffusers, export_locon

    (main, adapter), *encoders = adapters.items()
    others = {name: other for name, other in encoders if name in ("text_encoder", "text_encoder_2")}
    notes = []
    for place, write in (
        (DIFFUSERS, lambda out: export_diffusers(adapter, out, component=main, **others)),
        (COMFYUI, lambda out: export_locon(adapter, out, **others)),
    ):
        try:
            write(folder / place)
        except ValueError as error:
            notes.append(f"no file {place}: {_line(error)}")
    return notes


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _split(adapter: Path, part: str, out: Path) -> bool:
    """Write the updates of one part of the pipeline as an adapter of that part alone. Whether there are some."""
    from flora.convert.adapter import Adapter, write_adapter

    source, below = Adapter.open(adapter), f"{part}."
    own = [
        replace(update, site=replace(update.site, module=update.site.module.removeprefix(below)))
        for update in source.updates()
        if update.site.module.startswith(below)
    ]
    if own:
        out.mkdir()
        names = [update.site.module for update in own]
        write_adapter(out, replace(source.config, target_modules=names), own)
    return bool(own)
