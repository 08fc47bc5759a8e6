"""A server with one model and many adapters, the adapter of each request written into the running model:

    python examples/serve.py BASE english=ADAPTER french=OTHER   # then POST {"adapter": "french", "tokens": [1, 2, 3]}

Needs `pip install fastapi uvicorn`. `flora.hotswap` replaces numbers only, so that a compiled model is not compiled
anew; the adapters need the same targets. For a batch of several adapters at once, PEFT's `adapter_names` does it.
"""

import sys
from threading import Lock
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

import flora


class Request(BaseModel):
    adapter: str
    tokens: list[int]
    length: int = 8


def application(base: str, adapters: dict[str, str]) -> FastAPI:
    """The server. ``adapters``: folders by the names that requests use."""
    first = next(iter(adapters))
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[first]).eval()
    loaded, lock, server = [first], Lock(), FastAPI()

    @server.get("/adapters")
    def names() -> list[str]:
        return list(adapters)

    @server.post("/generate")
    def generate(request: Request) -> dict[str, list[int]]:
        if request.adapter not in adapters:
            raise HTTPException(404, f"no adapter {request.adapter!r}, but {', '.join(adapters)}")
        with lock, torch.no_grad():  # one request at a time: they share the model
            if loaded[0] != request.adapter:
                flora.hotswap(model, adapters[request.adapter])
                loaded[0] = request.adapter
            tokens = torch.tensor([request.tokens])
            answer = model.generate(input_ids=tokens, max_new_tokens=request.length, do_sample=False)
        return {"tokens": answer[0, len(request.tokens) :].tolist()}

    return server


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(application(sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:])))
