"""flora: low-rank core space adapters (FLoRA, arXiv 2405.14739) for weights of any number of dimensions.

Importing it makes FLORA known to PEFT: ``get_peft_model(model, FloraConfig(...))``.
"""

from flora.config import FloraConfig
from flora.core_space import CoreSpace
from flora.gradient import initialize
from flora.hotswap import hotswap
from flora.layer import FloraLayer
from flora.peft_compat import register
from flora.plan import plan
from flora.tuner import FloraModel

__version__ = "0.1.0"
__all__ = ["CoreSpace", "FloraConfig", "FloraLayer", "FloraModel", "hotswap", "initialize", "plan"]

register(FloraConfig, FloraModel, FloraLayer)
