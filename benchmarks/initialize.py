"""Time and memory of ``flora.initialize`` on a Llama of the size of the 7B model, with random weights.

    python benchmarks/initialize.py                        # 32 blocks: 16 GiB of memory, and a good while
    python benchmarks/initialize.py --blocks 2 --start activations
    python benchmarks/initialize.py --device cuda --tokens 2048

Memory: the peak during the call, of the process (CPU) or of what the allocator holds (GPU), over the bytes of the
model's weights. A step: forward and backward of the adapted model on one batch, for comparison.
"""

from __future__ import annotations

import argparse
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model
from rows import Results
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import flora

SIZE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 100}


def arguments() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--start", choices=["gradient", "activations"], default="gradient")
    flags.add_argument("--blocks", type=int, default=32)
    flags.add_argument("--batches", type=int, default=32)
    flags.add_argument("--tokens", type=int, default=64)
    flags.add_argument("--rank", type=int, default=16)
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--tiny", action="store_true", help="small layers, for a quick trial")
    flags.add_argument("--output", type=Path, metavar="FILE.json")
    flags.set_defaults(precision="bf16-base", keep_memory=False, channels_last=False, seed=0)
    return flags.parse_args()


def llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights in bfloat16, drawn once: the classes' own initialization draws them twice, in minutes."""
    config = LlamaConfig(**(TINY if args.tiny else SIZE), num_hidden_layers=args.blocks)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device=args.device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(args.device)
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
    return model


def weight_bytes(model: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


def timed(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """A list that has the most bytes that were held meanwhile, in the end."""
    peaks = [0]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peaks
        peaks[0] = torch.cuda.max_memory_allocated()
        return
    ended = threading.Event()

    def watch() -> None:
        import psutil

        while not ended.wait(0.01):
            peaks[0] = max(peaks[0], psutil.Process().memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    results = Results("initialize", args)
    warnings.filterwarnings("ignore", "adapter .* no data start")  # the step before it
    config = flora.FloraConfig(r=args.rank, target_modules="all-linear", init=args.start)
    model = get_peft_model(llama(args), config)
    base = weight_bytes(model.get_base_model())
    words = model.config.vocab_size
    tokens = torch.randint(words, (args.batches, 1, args.tokens), device=args.device)
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens]

    def loss() -> Tensor:
        return model(**batches[0]).loss

    step = timed(lambda: loss().backward(), args.device)
    model.zero_grad(set_to_none=True)
    with peak_memory(args.device) as peaks:
        seconds = timed(lambda: flora.initialize(model, batches), args.device)
    print(f"{args.start}: {seconds:.1f} s, {seconds / args.batches / step:.2f} steps per batch")
    print(f"peak {peaks[0] / 2**30:.2f} GiB, {peaks[0] / base:.2f} of the model's {base / 2**30:.2f} GiB")
    row = {
        "measure": "initialize", "workload": f"{args.blocks} blocks of Llama 7B", "method": args.start,
        "batches": args.batches, "tokens": args.tokens, "rank": args.rank, "seconds": round(seconds, 2),
        "step_seconds": round(step, 3), "model_bytes": base, "peak_bytes": peaks[0],
    }  # fmt: skip
    results.replace([row])


if __name__ == "__main__":
    main()
