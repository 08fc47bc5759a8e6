"""Adapters that somebody has tampered with: a command ends with its result or with one line, and writes only OUT."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from commands import flora
from flora import FloraConfig
from flora.convert import export_locon, import_locon
from flora.files import CONFIG, WEIGHTS

TRIALS = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# each reads an adapter or file "IN" and writes "OUT"
COMMANDS = {
    "flora": ("export lora IN OUT", "export diffusers IN OUT --component unet", "compress IN OUT --rank 1",
              "merge base.safetensors IN OUT.safetensors", "export locon IN OUT.safetensors"),
    "lora": ("import lora IN OUT", "import lora IN OUT --base model"),
    "authors": ("import official IN OUT --scale 1",),
    "locon": ("import locon IN model OUT",),
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 3, 3))


@pytest.fixture(autouse=True, scope="module")
def _short_cuts():
    """`compress` draws a figure, and a hundred of them take most of the time; the base of a LoCon needs no folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora.convert.truncation.find_spec", lambda name: None)
        patch.setattr("flora.convert.locon_import.empty_model", lambda name: net())
        yield


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of whole adapters and of what the commands need besides."""
    folder = tmp_path_factory.mktemp("originals")
    names = ["0", "1"]
    get_peft_model(net(), FloraConfig(r=2, target_modules=names, init_weights=False)).save_pretrained(folder / "flora")
    get_peft_model(net(), LoraConfig(r=2, target_modules=names, init_lora_weights=False)).save_pretrained(
        folder / "lora"
    )
    save_file(net().state_dict(), folder / "base.safetensors")
    space = {f"param_{n}": torch.ones(4, 2) for n in range(2)} | {"param_G": torch.ones(2, 2)}
    (folder / "authors").mkdir()
    save_file({f"0.flora_layer.{key}": tensor for key, tensor in space.items()}, folder / "authors" / WEIGHTS)
    (folder / "locon").mkdir()
    export_locon(folder / "flora", folder / "locon" / WEIGHTS, prefix="lora_unet")
    return folder


def run(originals: Path, folder: Path, kind: str, line: str, change) -> None:
    """Run a command on a changed copy of an adapter."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals, folder)
    change(folder / kind)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    source = folder / kind / WEIGHTS if kind in ("authors", "locon") else folder / kind
    names = {"IN": source, "OUT": folder / "OUT", "OUT.safetensors": folder / "OUT.safetensors",
             "base.safetensors": folder / "base.safetensors", "model": folder / "flora"}  # fmt: skip
    result = flora(*[names.get(word, word) for word in line.split()])
    assert isinstance(result.exception, (SystemExit, type(None))), repr(result.exception)
    if result.exit_code:
        assert result.exit_code == 2 and result.stderr.startswith("Error: "), result.stderr
        assert not list(folder.glob("*OUT*"))
    for path in list(folder.glob("OUT*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ----------------------------------------------------------------------------------------------- safetensors headers

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**53, 2**63, 2**64 - 1])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "dtype": st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X", 3, None]),
    "shape": st.lists(NUMBERS, max_size=5) | JSON,
    "data_offsets": st.tuples(NUMBERS, NUMBERS).map(list) | JSON,
}


@st.composite
def header_changes(draw):
    """A function that changes the header of a safetensors file, or the bytes around it."""
    way = draw(st.sampled_from(["field", "field", "key", "drop", "add", "length", "cut", "bytes"]))
    index, number = draw(st.integers(0, 30)), draw(NUMBERS)
    name, share, noise = draw(st.sampled_from(sorted(FIELDS))), draw(st.floats(0, 1)), draw(st.binary(max_size=9))
    value = draw({"field": FIELDS[name], "add": JSON, "key": st.text(max_size=12)}.get(way, st.none()))

    def change(folder: Path) -> None:
        file = folder / WEIGHTS
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        keys = [key for key in header if key != "__metadata__"]
        key = keys[index % len(keys)]
        if way == "field":
            header[key][name] = value
        elif way == "key":
            header[value] = header.pop(key)
        elif way == "drop":
            del header[key]
        elif way == "add":
            header["extra"] = value
        text = json.dumps(header).encode()
        content = struct.pack("<Q", number % 2**64 if way == "length" else len(text)) + text + body
        place = int(share * len(content))
        if way == "cut":
            content = content[:place]
        elif way == "bytes":
            content = content[:place] + noise + content[place + len(noise) :]
        file.write_bytes(content)

    return change


@TRIALS
@given(change=header_changes(), pick=st.integers(0, 99))
def test_a_changed_header_is_read_or_refused(change, pick, originals):
    kind, line = pick_command(pick, COMMANDS)
    run(originals, originals.parent / "headers", kind, line, change)


def pick_command(pick: int, commands: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    lines = [(kind, line) for kind, own in commands.items() for line in own]
    return lines[pick % len(lines)]


# --------------------------------------------------------------------------------------------------- adapters' configs


@st.composite
def config_changes(draw):
    """A function that changes an ``adapter_config.json``."""
    index, inner = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    value = draw(JSON)
    way = draw(st.sampled_from(["value", "value", "inside", "drop", "key", "text"]))
    text = draw(st.sampled_from(["", "[]", "3", "{", "[" * 100_000, '{"peft_type":' * 50_000, "\x00", "null"]))

    def change(folder: Path) -> None:
        file = folder / CONFIG
        content = json.loads(file.read_text())
        key = sorted(content)[index % len(content)]
        if way == "value":
            content[key] = value
        elif way == "inside" and isinstance(content[key], dict) and content[key]:
            content[key][sorted(content[key])[inner % len(content[key])]] = value
        elif way == "inside":
            content[key] = [content[key], value]
        elif way == "drop":
            del content[key]
        elif way == "key":
            content[str(value)] = value
        file.write_text(text if way == "text" else json.dumps(content))

    return change


@TRIALS
@given(change=config_changes(), pick=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about keys and options that it does not know
def test_a_changed_config_is_read_or_refused(change, pick, originals):
    kind, line = pick_command(pick, {kind: COMMANDS[kind] for kind in ("flora", "lora")})
    run(originals, originals.parent / "configs", kind, line, change)


# ----------------------------------------------------------------------------------------------------- LoCons' meaning

SHAPES = {"0": (4, 4), "1": (3, 2, 3, 3)}  # of `net`
KEYS = ["lora_up.weight", "lora_mid.weight", "lora_down.weight", "alpha", "dora_scale", "hada_w1_a", "diff", "scale"]


@st.composite
def locons(draw):
    """The tensors of a file in LyCORIS' form, with what people's files have, also by mistake."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name in draw(st.sampled_from([["0"], ["1"], ["0", "1"], ["0", "7"]])):
        out, inputs, *kernel = SHAPES.get(name, (4, 4))
        rank, inner = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        tucker, ones = draw(st.booleans()), [1] * draw(st.sampled_from([0, len(kernel), 2]))
        shapes = {"lora_up.weight": (out, rank, *ones)}
        if tucker:
            shapes |= {"lora_down.weight": (inner, inputs, *ones), "lora_mid.weight": (rank, inner, *kernel)}
        else:
            shapes |= {"lora_down.weight": (rank, inputs, *kernel)}
        for end, shape in shapes.items():
            dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int32]))
            tensors[f"lora_unet_{name}.{end}"] = (10 * torch.randn(shape, generator=generator)).to(dtype)
        alpha = draw(st.sampled_from([None, 0.0, 1.0, 3.0, -2.0, torch.inf, torch.nan]))
        if alpha is not None:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    key = draw(st.sampled_from(sorted(tensors)))
    way, other = (
        draw(st.sampled_from(["as it is", "as it is", "drop", "rename", "add", "nan", "turn"])),
        draw(st.sampled_from(KEYS)),
    )
    tensor = tensors[key]
    if way in ("drop", "rename", "nan", "turn"):
        del tensors[key]
    if way in ("rename", "add"):
        tensors[f"{key.partition('.')[0]}.{other}"] = tensor.clone()
    if way == "nan":
        tensors[key] = tensor * torch.nan
    if way == "turn":
        tensors[key] = tensor.T.contiguous() if tensor.ndim == 2 else tensor.flatten()
    return tensors


def literal_delta(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What LyCORIS makes of a layer's tensors, in float64."""
    own = {key.partition(".")[2]: t.double() for key, t in tensors.items() if key.startswith(f"lora_unet_{name}.")}
    up, down = own.pop("lora_up.weight"), own.pop("lora_down.weight")
    rank, shape = down.shape[0], SHAPES[name]
    alpha = own.pop("alpha", torch.tensor(rank)).item() or rank
    mid = own.pop("lora_mid.weight", None)
    assert not own, "a key that changes what the others mean was taken"
    if mid is None:
        delta = up.flatten(1) @ down.flatten(1)
    else:
        delta = torch.einsum("or,rs...,si->oi...", up.flatten(1), mid, down.flatten(1))
    return alpha / rank * delta.reshape(shape)


@settings(TRIALS, max_examples=200)
@given(tensors=locons())
def test_a_locon_is_imported_exactly_or_refused(tensors, originals):
    folder = originals.parent / "exactly"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file(tensors, folder / "file.safetensors")
    try:
        import_locon(folder / "file.safetensors", net(), folder / "OUT")
    except ValueError:
        assert not (folder / "OUT").exists()
        return
    layers = {key[len("lora_unet_")] for key in tensors}
    model = PeftModel.from_pretrained(net().double(), folder / "OUT")
    for name in layers:
        layer = model.base_model.model.get_submodule(name)
        want = literal_delta(tensors, name)
        # terms of either sign may cancel, so an entry is compared with the largest one
        atol = 1e-6 * max(1.0, want.abs().max().item())
        torch.testing.assert_close(layer.get_delta_weight("default"), want, rtol=1e-5, atol=atol)
