"""To and from other formats, adapter by adapter and weight by weight: no model has to be in memory."""

from flora.convert.compression import compress
from flora.convert.diffusers import export_diffusers
from flora.convert.extraction import extract
from flora.convert.locon import export_locon
from flora.convert.locon_import import import_locon
from flora.convert.lora import export_lora
from flora.convert.lora_import import import_lora
from flora.convert.merging import merge
from flora.convert.official import import_official
from flora.convert.picture import show
from flora.convert.verification import verify

__all__ = [
    "compress", "export_diffusers", "export_locon", "export_lora", "extract", "import_locon", "import_lora",
    "import_official", "merge", "show", "verify",
]  # fmt: skip
