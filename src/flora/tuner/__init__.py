"""The PEFT tuner, laid out as PEFT lays out its own. Importing it makes FLORA known to PEFT."""

from flora.tuner.config import FloraConfig
from flora.tuner.gradient import initialize
from flora.tuner.hotswap import hotswap
from flora.tuner.layer import FloraLayer
from flora.tuner.model import FloraModel
from flora.tuner.peft_compat import register
from flora.tuner.planning import plan

__all__ = ["FloraConfig", "FloraLayer", "FloraModel", "hotswap", "initialize", "plan"]

register(FloraConfig, FloraModel, FloraLayer)
