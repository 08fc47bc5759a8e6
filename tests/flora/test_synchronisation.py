"""No step waits for the device to give a number to Python: CUDA graphs could not record one that does."""

from __future__ import annotations

import pytest
import torch
from test_pool import FORMS, POOLED, choose
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES
from reference import first
from test_contract import build

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}
WAYS = [{"execution": "auto"}, {"execution": "factored"}, {"execution": "merged"}, {"dropout": 0.5}]


class Waits(TorchDispatchMode):
    """Counts the operations whose result Python looks at, or whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") in WAITING
        return func(*args, **(kwargs or {}))


def waits(model, args) -> int:
    with Waits() as mode:
        output = first(model(*args))
        if output.requires_grad:
            output.square().sum().backward()
    return mode.count


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, *way.items())))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_step_waits_no_more_than_the_base_layer(case, way):
    model, base, args = build(case, torch.float32, **way)
    assert waits(model.train(), args) <= waits(base.train(), args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", POOLED, ids=lambda case: case.id)
def test_no_form_of_the_pool_waits(case, form, monkeypatch):
    choose(monkeypatch, form)
    model, _, args = build(case, torch.float32)
    assert waits(model, args) == 0


def test_a_wait_is_seen():
    assert waits(lambda x: x * x.max().item(), (torch.ones(2, requires_grad=True),)) == 1
