"""Within one call of ``generate``, D and U are kept; between calls, nothing is."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model

from flora import FloraConfig
from flora.layers.execution import pool


def test_generate_keeps_thin_factors_for_one_call(monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    formed = []
    monkeypatch.setattr("flora.tuner.live.form", lambda own, **pads: formed.extend(own) or pool.form(own, **pads))
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=13, bos_token_id=0, eos_token_id=None))
    config = FloraConfig(r=2, target_modules=["c_attn", "c_fc"], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    tokens = torch.arange(6).view(2, 3)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def generate():
        formed.clear()
        result = model.generate(input_ids=tokens, **options)
        assert [entry.form for entry in formed] == ["factored"] * 4
        return result

    def merged():
        return copy.deepcopy(model).merge_and_unload().generate(input_ids=tokens, **options)

    assert torch.equal(generate(), merged())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(-3)
    assert torch.equal(generate(), merged())
