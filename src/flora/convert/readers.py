"""Which programs read what an export wrote: a program that finds no name it knows loads nothing, and says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flora.layers.sites import Site

LOCON_PREFIX = re.compile(r"(lora_unet|lora_te\d?|lycoris)_")


def readers_of_locon(prefixes: Sequence[str], with_mid: bool) -> str:
    """Of a LoCon file with layers under these prefixes; ``with_mid``: whether it has lora_mid."""
    if all(prefix == "lycoris" for prefix in prefixes):
        others = "other programs for diffusion need --prefix lora_unet (U-Nets) or lora_te"
        return f"for LyCORIS (create_lycoris_from_weights), and ComfyUI (diffusers' U-Nets and transformers); {others}"
    if not all(LOCON_PREFIX.match(f"{prefix}_") for prefix in prefixes):
        return f"for a loader that is told the prefix {', '.join(prefixes)}"
    kohya = "kohya's scripts and diffusers need --folded" if with_mid else "also kohya's scripts and diffusers"
    return f"for ComfyUI, A1111, Forge and InvokeAI; {kohya}; LyCORIS alone needs --prefix lycoris"


def readers_of_lora(sites: Iterable[Site], rank: int) -> str:
    """Of a PEFT LoRA with these layers."""
    if all(site.kind.lora_form == "linear" for site in sites):
        return f"for PEFT and transformers; vLLM (--max-lora-rank {rank} or the next it takes), SGLang, llama.cpp"
    return "for PEFT and transformers; vLLM, SGLang and llama.cpp take linear layers only"
