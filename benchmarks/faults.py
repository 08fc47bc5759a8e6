"""The kinds of fault that `reliability.py` tries: functions of a method and a number of tries, that yield for each try
whether it passed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flora import FloraConfig
from flora.convert import import_lora
from flora.files import CONFIG, WEIGHTS


class Net(nn.Module):
    """A convolution, an attention and linear layers of some width, so that saving takes a while."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.attention = nn.Conv2d(3, width, 3, padding=1), nn.MultiheadAttention(width, 4, batch_first=True)
        self.inner, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(torch.tanh(self.inner(x)))


def adapted(method: str, rank: int = 4, seed: int = 0, base: nn.Module | None = None, **options) -> PeftModel:
    """A model with an adapter that has an effect."""
    names = ["conv", "attention", "inner", "out"]
    if method == "flora":
        config = FloraConfig(r=rank, target_modules=names, init_weights=False, **options)
    else:
        config = LoraConfig(r=rank, target_modules=names, init_lora_weights=False, **options)
    base = Net() if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:  # LoRA's way to an effect is as large as ours
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def picture(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def base_weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n and "tucker_" not in n]


# ------------------------------------------------------------------------------------------------------------ the kinds


def threads(method: str, tries: int) -> Iterator[bool]:
    """Calls from four threads give what one thread gives; the last try is whether the base weights stay."""
    model, inputs = adapted(method), [picture(seed) for seed in range(tries)]
    before = base_weights(model)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [copy.deepcopy(model)(x) for x in inputs]
        found = list(pool.map(lambda x: _result(model, x), inputs))
    yield from (one is not None and same(one, other) for one, other in zip(found, expected, strict=True))
    after = base_weights(model)
    yield len(after) == len(before) and all(map(torch.equal, after, before))


def _result(model: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            return model(x)
    except Exception:
        return None


def unmerge(method: str, tries: int) -> Iterator[bool]:
    """After merging, a change of the adapter and unmerging, the base weights are the same to the bit."""
    for number in range(tries):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        model = adapted(method, seed=number, base=Net().to(dtype))
        before = base_weights(model)
        model.merge_adapter()
        if number % 4 > 1:
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_scale("default", 0.5)
        model.unmerge_adapter()
        yield all(map(torch.equal, base_weights(model), before))


def trained(method: str, tries: int) -> Iterator[bool]:
    """A base weight that is trained while adapters are merged keeps what it has learned, or unmerging is refused."""
    for number in range(tries):
        model = adapted(method, seed=number)
        before = base_weights(model)
        model.merge_adapter()
        weights = [p for n, p in model.named_parameters() if "lora_" not in n and "tucker_" not in n]
        changed = weights[number % len(weights)]
        with torch.no_grad():
            changed += 0.1
        merged = base_weights(model)
        try:
            model.unmerge_adapter()
        except ValueError:
            yield all(map(torch.equal, base_weights(model), merged))
        else:
            want = [w + 0.1 * (n == number % len(weights)) for n, w in enumerate(before)]
            yield all(torch.allclose(mine, one, atol=1e-5) for mine, one in zip(base_weights(model), want, strict=True))


def not_finite(method: str, tries: int) -> Iterator[bool]:
    """An adapter with a number that is not finite is not merged, and no base weight changes."""
    for number in range(tries):
        model = adapted(method, seed=number)
        before = base_weights(model)
        broken = [p for n, p in model.named_parameters() if "lora_" in n or "tucker_" in n]
        with torch.no_grad():
            broken[number % len(broken)].view(-1)[0] = (torch.nan, torch.inf)[number % 2]
        try:
            model.merge_adapter()
        except Exception:
            model = model if not any(getattr(m, "merged", False) for m in model.modules()) else nn.Identity()
        after = base_weights(model)
        yield len(after) == len(before) and all(map(torch.equal, after, before))


def kill(method: str, tries: int) -> Iterator[bool]:
    """After `kill -9` in `save_pretrained` over another adapter, the folder holds the old adapter or the new one."""
    processes, x = multiprocessing.get_context("forkserver"), picture()
    processes.set_forkserver_preload(["flora.tuner", "peft"])
    with torch.no_grad():
        expected = [adapted(method, rank, rank)(x) for rank in (4, 8)]
    for number in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            adapted(method, 4, 4).save_pretrained(folder)
            ready = processes.Event()
            process = processes.Process(target=_save_for_ever, args=(method, folder, ready), daemon=True)
            process.start()
            ready.wait()
            time.sleep(random.Random(number).random() * 0.1)
            process.kill()
            process.join()
            try:
                with torch.no_grad():
                    found = PeftModel.from_pretrained(Net(), folder).eval()(x)
            except Exception:
                yield False
            else:
                yield any(same(found, one) for one in expected)


def _save_for_ever(method: str, folder: str, ready) -> None:
    warnings.simplefilter("ignore")
    models = [adapted(method, rank, rank) for rank in (8, 4)]
    ready.set()
    while True:
        for model in models:
            model.save_pretrained(folder)


def headers(method: str, tries: int) -> Iterator[bool]:
    """An adapter whose file has changed bytes is loaded as the file says, or refused with the base model as it was."""

    def spoil(folder: Path, dice: random.Random) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        length = int.from_bytes(content[:8], "little")
        for _ in range(dice.randint(1, 4)):
            content[dice.randrange(8 + length)] = dice.randrange(256)
        (folder / WEIGHTS).write_bytes(content if dice.random() < 0.8 else content[: dice.randrange(len(content))])

    yield from _loads(method, tries, spoil)


def configs(method: str, tries: int) -> Iterator[bool]:
    """The same for an adapter whose config has another value."""
    values = [None, True, -1, 0, 3, 1e400, "x", "(", [], [[]], {}, {"a": 1}]

    def spoil(folder: Path, dice: random.Random) -> None:
        content = json.loads((folder / CONFIG).read_text())
        content[dice.choice(sorted(content))] = dice.choice(values)
        (folder / CONFIG).write_text(json.dumps(content))

    yield from _loads(method, tries, spoil)


def _loads(method: str, tries: int, spoil: Callable[[Path, random.Random], None]) -> Iterator[bool]:
    """Whether each spoilt adapter computes what the whole one does, or raises an error and wraps no layer."""
    x, model = picture(), adapted(method)
    with torch.no_grad(), tempfile.TemporaryDirectory() as whole:
        expected, plain = model(x), Net()(x)
        model.save_pretrained(whole)
        for number in range(tries):
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(whole, folder, dirs_exist_ok=True)
                spoil(Path(folder), random.Random(number))
                base = Net().eval()
                layers = [type(module) for module in base.modules()]
                try:
                    found = PeftModel.from_pretrained(base, folder).eval()(x)
                except Exception:
                    yield layers == [type(module) for module in base.modules()] and same(base(x), plain)
                else:
                    yield same(found, expected)


def imports(method: str, tries: int) -> Iterator[bool]:
    """A LoRA of any start and option is imported exactly, or refused."""
    options = [
        {}, {"use_rslora": True}, {"rank_pattern": {"inner": 2}}, {"alpha_pattern": {"out": 3}}, {"use_dora": True},
        *({"init_lora_weights": start} for start in ("gaussian", "orthogonal", "pissa", "olora", "pissa_niter_4")),
    ]  # fmt: skip
    for number in range(tries if method == "flora" else 0):
        own = options[number % len(options)]
        config = LoraConfig(r=4, target_modules=["inner", "out"], **own)
        torch.manual_seed(number)
        lora, base, x = get_peft_model(Net(), config).eval(), Net().eval(), picture()
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for parameter in lora.parameters():
                parameter += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
            lora.save_pretrained(folder)
            try:
                import_lora(folder, f"{folder}/flora", base=base if number // len(options) % 2 == 0 else None)
            except ValueError:
                yield True
            else:
                found = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/flora").eval()(x)
                yield torch.allclose(found, lora(x), rtol=1e-3, atol=1e-4)
