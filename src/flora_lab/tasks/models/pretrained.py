"""A task's model: from a folder, the hub, or a config, optionally with the weights of a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from flora.files import local_path, open_tensors
from flora_lab.errors import SectionError

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Pretrained:
    name: str | None = field(
        default=None, metadata={"help": "a transformers model: a folder, a name on the hub, or timm/NAME", "path": True}
    )
    config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "instead of a name: model_type and the fields of its config"}
    )
    weights: str | None = field(
        default=None, metadata={"help": "safetensors file with the weights, if given by config", "path": True}
    )

    def load(self, kind: str, head: tuple[str, ...], usual: str | None = None, **overrides: Any) -> nn.Module:
        """The model as transformers' Auto class ``kind``, with ``overrides`` in its config.

        The modules under ``head`` get new weights. ``usual``: the model_type of a config that may lack it, or be empty.
        Raises ValueError naming the key of the model, or the file.
        """
        import torch
        import transformers

        from flora_lab.tasks.models import cifar_resnet

        if usual is None:
            self.check()
        cifar_resnet.register()
        auto = getattr(transformers, kind)
        try:
            if self.name:
                keys = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **overrides}
                model = auto.from_pretrained(self.source(), **keys)
                redraw(model, head)  # from_pretrained keeps a head with as many classes
                return model
            model = auto.from_config(make_config({"model_type": usual, **self.config}, **overrides))
        except Exception as error:  # a model's own code may raise anything
            raise self.fault(brief(error, self.name)) from error
        if self.weights:
            load_weights(model, self.weights, head)
        return model

    def source(self) -> str:
        """The folder, or the name on the hub. Raises ValueError if it is a folder that does not exist."""
        from flora.models import hub_name  # which needs torch

        return str(local_path(self.name) or hub_name(str(self.name)))

    def check(self) -> None:
        """Raise ValueError if the keys do not name exactly one model."""
        if (self.name is None) == (not self.config):
            given = f"got name={self.name} and config={self.config}"
            raise SectionError(self, "", f"a model is given by name or config, {given}")
        if self.config and "model_type" not in self.config:
            raise SectionError(self, f"config={self.config}", "expected a model_type, such as convnextv2")
        if self.name and self.weights:
            raise SectionError(self, f"weights={self.weights}", f"a named model ({self.name}) has its own")

    def fault(self, text: str) -> SectionError:
        """What is wrong with the model, under the key that it is given by."""
        kind = f".model_type={self.config['model_type']}" if "model_type" in self.config else ""
        return SectionError(self, f"name={self.name}" if self.name else f"config{kind}", text)


def make_config(fields: dict[str, Any], **overrides: Any) -> Any:
    """The transformers config of ``fields``: model_type and others.

    Raises ValueError for an unknown field: transformers would store it, and nothing would read it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = str(fields["model_type"])
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no such model_type{_nearest(kind, CONFIG_MAPPING)}")
    config = AutoConfig.for_model(**{**fields, **overrides})
    plain = type(config)()
    known = {*dir(plain), *plain.attribute_map}
    for name in fields:
        if name not in known and name in vars(config):  # else it is another name of a known one
            raise ValueError(f"{type(config).__name__} has no {name!r}{_nearest(name, known)}")
    return config


def _nearest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, sorted(known))
    return f"; nearest: {', '.join(close)}" if close else ""


def brief(error: Exception, name: object = None) -> str:
    """The message in one line, cut off: transformers may list hundreds of models. Without ``name``, if it begins so."""
    return shorten(str(error).removeprefix(f"{name}: "), 400, placeholder=" …") or type(error).__name__


def redraw(model: nn.Module, head: tuple[str, ...]) -> None:
    """Draw new weights, from torch's generator, for every module of the head."""
    below = tuple(f"{name}." for name in head)
    for name, module in model.named_modules():
        if f"{name}.".startswith(below) and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def load_weights(model: nn.Module, file: str, head: tuple[str, ...]) -> None:
    """Load every weight of ``file`` except the head's, which has other classes. Names are the model's, or timm's for
    a model of timm. Raises ValueError if names or shapes differ from the model's."""
    model = (
        getattr(model, "timm_model", None) or getattr(model, "_backbone", None) or model
    )  # transformers' two wrappers
    own = model.state_dict()
    below = tuple(f"{name}." for name in head)
    with open_tensors(file) as tensors:
        saved = {name: tensors.get_tensor(name) for name in tensors.keys() if not name.startswith(below)}
    wanted = {name for name in own if not name.startswith(below) and not name.endswith("num_batches_tracked")}
    for name in sorted(wanted ^ {name for name in saved if not name.endswith("num_batches_tracked")}):
        raise ValueError(f"{file}: {name!r} is in only one of the file and {type(model).__name__}")
    for name, tensor in saved.items():
        if name in own and tensor.shape != own[name].shape:
            raise ValueError(f"{file}: {name!r} is {list(tensor.shape)}, the model's is {list(own[name].shape)}")
    model.load_state_dict(own | {name: tensor for name, tensor in saved.items() if name in own})
