"""To and from other formats, adapter by adapter and weight by weight: no model has to be in memory."""

from flora.convert.lora import export_lora, import_lora

__all__ = ["export_lora", "import_lora"]
