"""The `flora` command: each subcommand is one call. A mistake prints one line that names it, with exit code 2.

Other packages add commands through the entry point group `flora.commands`. Nothing heavy is imported before a command
runs, so that help and typos answer at once.
"""

from __future__ import annotations

import click

from flora import __version__
from flora.cli.conversions import compress, export, extract, import_, merge, show_
from flora.cli.planning import plan
from flora.keys import Commands

SECTIONS = {
    "Plan, train and compare": ("init", "data", "plan", "train", "compare", "analyse"),
    "Use an adapter elsewhere": ("export", "merge", "import"),
    "Look into an adapter, and change its size": ("show", "compress", "extract"),
}
COMPLETION = """Completion by the tab key: eval "$(_FLORA_COMPLETE=bash_source flora)", with zsh_source or fish_source
in other shells."""


@click.group(
    cls=Commands, sections=SECTIONS, epilog=COMPLETION, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="flora")
def main() -> None:
    """Fine-tune frozen models with low-rank core adapters, for weights of any number of dimensions."""


for command in (plan, export, merge, import_, show_, compress, extract):
    main.add_command(command)
