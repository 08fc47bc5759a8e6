"""`flora export`, `import`, `merge`, `show`, `extract` and `compress`: each calls a function of ``flora.convert``."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from flora.cli.planning import write_page
from flora.keys import SLOW_PATTERN, Refused, time_limit

SHOWN = 20  # weights in the table of `flora show`
VERIFY_SECONDS = 3600.0  # far above what any model takes


@click.group()
def export() -> None:
    """Export an adapter for programs without flora."""


@click.group("import")
def import_() -> None:
    """Import an adapter of another program, exactly."""


def convert(
    name: str, model: str | None, sides: tuple[str, str, str], options: dict[str, Any] | None = None, **arguments: Any
) -> None:
    """Call ``flora.convert.NAME`` and print its result; with a model, verify the two sides on it.

    The model is loaded and run first, so that nothing is written if it can't verify.

    Args:
        sides: the FLoRA side, the other side, and the other side's format.
        options: what loading the other side takes.
    """
    from flora.models import quiet

    quiet()
    from flora import convert
    from flora.convert.verification import Verification

    adapter, other, form = sides
    try:
        known = adapter if arguments.get("adapter") == adapter else None  # otherwise it is what is written
        check = Verification(model, form, known, arguments.get("component")) if model else None
        click.echo(str(getattr(convert, name)(**arguments, progress=True)))
        if check:
            with time_limit(VERIFY_SECONDS, f"verifying took too long; {SLOW_PATTERN}"):
                click.echo(str(check.compare(adapter, other, **(options or {}))))
            for encoder in filter(None, [arguments.get("text_encoder"), arguments.get("text_encoder_2")]):
                click.echo(f"not verified: {encoder}")
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: pip install 'flora-peft[convert]'") from error


def paths(
    first: str, second: str, help: str = "Load both sides onto MODEL, a model or a pipeline, and compare the outputs."
) -> Callable:
    """The two paths of a conversion, and --verify."""

    def decorate(command: Callable) -> Callable:
        command = click.option("--verify", metavar="MODEL", help=help)(command)
        return click.argument(first)(click.argument(second)(command))

    return decorate


ENCODERS = (
    click.option("--text-encoder", metavar="ADAPTER", help="A second adapter, for the text encoder."),
    click.option("--text-encoder-2", metavar="ADAPTER", help="A third adapter, for SDXL's second text encoder."),
)
SIZE = (
    click.option("--budget", help="Parameters of all layers together, or a share (0.005) of BASE's or ADAPTER's."),
    click.option("--energy", type=float, help="The least share of its squared norm that each layer keeps."),
    click.option("--rank", type=int, help="One rank for every mode."),
)


def options(*some: Callable) -> Callable:
    """Several options in one decorator."""
    return lambda command: reduce(lambda made, option: option(made), reversed(some), command)


@export.command("lora")
@paths("adapter", "out")
@click.option("--ragged", is_flag=True, help="Keep each layer's own rank. Otherwise all get the largest, with zeros.")
@click.option("--merge-rest", metavar="BASE", help="Save layers without a LoRA form whole, merged into BASE's weights.")
def export_lora(adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """Write a plain PEFT LoRA.

    ADAPTER is a FLoRA adapter's folder, or its name on the hub. OUT is a new folder.
    """
    convert("export_lora", verify, (adapter, out, "lora"), adapter=adapter, out=out, **options)


@export.command("locon")
@paths("adapter", "out")
@options(*ENCODERS)
@click.option("--prefix", help="Prefix of the names in the file [lora_unet, lora_te or lycoris, by the model].")
@click.option("--folded", is_flag=True, help="Write no `lora_mid`, for programs that do not know it.")
def export_locon(adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """Write a LoCon of LyCORIS / kohya.

    ComfyUI, A1111 and InvokeAI read it. ADAPTER is a FLoRA adapter's folder, or its name on the hub. OUT is a new file.
    """
    convert("export_locon", verify, (adapter, out, "locon"), adapter=adapter, out=out, **options)


@export.command("diffusers")
@paths("adapter", "out")
@options(*ENCODERS)
@click.option("--component", help="The component of the pipeline [unet, transformer or text_encoder, by the model].")
def export_diffusers(adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """Write a LoRA for diffusers.

    `pipeline.load_lora_weights(OUT)` loads it. ADAPTER is a FLoRA adapter's folder, or its name on the hub. OUT is a
    new folder.
    """
    convert("export_diffusers", verify, (adapter, out, "diffusers"), adapter=adapter, out=out, **options)


@import_.command("lora")
@paths("lora", "out")
@click.option("--base", metavar="BASE", help="The model that it adapts, for PiSSA, OLoRA, and the kinds of its layers.")
@click.option("--is-transposed", is_flag=True, help="Without BASE: stacked experts are (experts, in, out).")
def import_lora(lora: str, out: str, verify: str | None, **options: Any) -> None:
    """Read a PEFT LoRA.

    LORA is its folder, or its name on the hub. OUT is a new folder, for the FLoRA adapter.
    """
    convert("import_lora", verify, (out, lora, "lora"), lora=lora, out=out, **options)


@import_.command("locon")
@click.argument("file")
@click.argument("base")
@click.argument("out")
@click.option("--prefix", help="Prefix of the names to import, if the file has several.")
@click.option("--verify", is_flag=True, help="Load both sides onto BASE and compare the outputs.")
def import_locon(file: str, base: str, out: str, verify: bool, prefix: str | None) -> None:
    """Read a LoCon of LyCORIS / kohya.

    BASE is the model that FILE adapts: a folder, or a name on the hub. OUT is a new folder, for the FLoRA adapter.
    """
    sides = (out, file, "locon")
    convert("import_locon", base if verify else None, sides, file=file, base=base, out=out, prefix=prefix)


@import_.command("official")
@paths("checkpoint", "out")
@click.option("--scale", type=float, required=True, help="The s that it was trained with; the file does not tell.")
@click.option("--prefix", help="What precedes the model's own names in the file.")
@click.option("--save", multiple=True, metavar="LAYER", help="A layer to copy whole, such as a new head.")
def import_official(checkpoint: str, out: str, verify: str | None, **options: Any) -> None:
    """Read a checkpoint of the FLoRA authors' code.

    OUT is a new folder, for the FLoRA adapter.
    """
    sides = (out, checkpoint, "official")
    convert("import_official", verify, sides, options, checkpoint=checkpoint, out=out, **options)


@click.command()
@click.argument("base")
@paths("adapter", "out", "Load MODEL with the adapter, and OUT, and compare the outputs.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="The largest size of one file.")
def merge(base: str, adapter: str, out: str, verify: str | None, **options: Any) -> None:
    """Merge an adapter into its base model's weights.

    BASE is a folder, a file of weights, or a name on the hub. OUT is a new folder; or a new file, if it ends in
    .safetensors.
    """
    convert("merge", verify, (adapter, out, "merged"), base=base, adapter=adapter, out=out, **options)


@click.command()
@click.argument("base")
@paths("tuned", "out", "Load MODEL with the result, and TUNED, and compare the outputs.")
@options(*SIZE)
@click.option("--keep-rest/--drop-rest", default=True, show_default=True, help="Keep what no core can hold, whole.")
def extract(base: str, tuned: str, out: str, verify: str | None, budget: str | None, **options: Any) -> None:
    """Extract an adapter from a full fine-tune.

    The adapter is the difference of the checkpoints BASE and TUNED at the best ranks of a size. OUT is a new folder.
    """
    options["budget"] = parse_budget(budget)
    convert("extract", verify, (out, tuned, "merged"), base=base, tuned=tuned, out=out, **options)


@click.command()
@paths("adapter", "out")
@options(*SIZE)
def compress(adapter: str, out: str, verify: str | None, budget: str | None, **options: Any) -> None:
    """Compress an adapter to smaller ranks.

    ADAPTER is a folder, or a name on the hub. OUT is a new folder.
    """
    options["budget"] = parse_budget(budget)
    convert("compress", verify, (out, adapter, "flora"), adapter=adapter, out=out, **options)


@click.command("show", short_help="Show what an adapter has learned.")
@click.argument("adapter")
@click.option("--all", "every", is_flag=True, help=f"List every weight, and not only the {SHOWN} that learned most.")
@click.option("--html", metavar="FILE", help="Also draw it, on a page of its own in a new FILE.")
def show_(adapter: str, every: bool, html: str | None) -> None:
    """Show what an adapter has learned: norms, spectra, and the layers that matter.

    ADAPTER is a FLoRA adapter or a PEFT LoRA, a folder or a name on the hub; or a LoCon file. The share is a weight's
    part of the squared norm of all updates; a rank is in use if it is needed for 99 % of the weight's.
    """
    from flora.models import quiet

    quiet()
    from flora.convert import show

    try:
        shown = show(adapter)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error
    written = html and write_page(html, shown.html())
    click.echo("\n".join(filter(None, [shown.lines(None if every else SHOWN), written])))


def parse_budget(budget: str | None) -> int | float | None:
    """A number of parameters, or a share; raises Refused for anything else."""
    if budget is None:
        return None
    try:
        return float(budget) if "." in budget or "e" in budget else int(budget.replace(",", ""))
    except ValueError:
        raise Refused(f"--budget {budget}: a whole number of parameters, or a share such as 0.005") from None
