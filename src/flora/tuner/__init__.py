"""The PEFT tuner, laid out as PEFT lays out its own. Importing it makes FLORA known to PEFT."""

from flora.tuner.config import FloraConfig
from flora.tuner.layer import FloraLayer
from flora.tuner.model import FloraModel
from flora.tuner.peft_compat import register

__all__ = ["FloraConfig", "FloraLayer", "FloraModel"]

register(FloraConfig, FloraModel, FloraLayer)
