"""Conversions: every file that is written is read back by the program it is for, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from cases import CASES, Case
from flora.convert import export_lora, import_lora
from reference import first
from test_contract import Holder, build

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# what PEFT's LoRA has no form for, by the row's name
NO_LORA = {
    case.id
    for case in CASES
    if any(word in case.id for word in ("groups", "depthwise", "wide_kernel", "dilation", "circular", "reflect"))
    or any(word in case.id for word in ("own_forward", "max_norm", "by_freq", "same_even", "same", "Transpose"))
    or case.id.startswith(("EmbeddingBag", "Bilinear", "MultiheadAttention", "LayerNorm"))
    or case.id in ("parameter-9", "parameter-3x2x2x4", "parameter-2x3x2x2x3", "parameter-2x2x3x2x2x2")
}


def saved(case: Case, folder: Path, **options):
    """(the adapter's folder, a copy of its base model, the outputs, inputs)."""
    model, base, args = build(case, **options)
    model.save_pretrained(str(folder / "flora"))
    with torch.no_grad():
        return folder / "flora", Holder(base), first(model(*args)), args


def loaded(base, folder, *args):
    with torch.no_grad():
        return first(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(*args))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("case", [c for c in CASES if c.id not in NO_LORA], ids=lambda case: case.id)
def test_a_lora_gives_the_same_outputs_and_so_does_its_way_back(case, ragged, tmp_path):
    adapter, base, expected, args = saved(case, tmp_path)
    export_lora(adapter, tmp_path / "lora", ragged=ragged)
    torch.testing.assert_close(loaded(base, tmp_path / "lora", *args), expected, **CLOSE)
    import_lora(tmp_path / "lora", tmp_path / "back")
    torch.testing.assert_close(loaded(base, tmp_path / "back", *args), expected, **CLOSE)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in NO_LORA], ids=lambda case: case.id)
def test_what_has_no_lora_form_is_named_and_nothing_is_written(case, tmp_path):
    adapter, *_ = saved(case, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)layer.*flora merge"):
        export_lora(adapter, tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["flora"]
