"""What mkdocs does beyond its own: pages made from files outside docs/, and links between the two.

A file that the repository already has stays the one place of its content: README.md is the site's front page.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # of the site, and the file that each is made from
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
}
FIELDS = "<!-- fields of FloraConfig -->"
WIDTH = 80  # columns of the page's code blocks on a desktop
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Leave out the pages of the navigation that are not written yet."""
    config.nav = [entry for entry in map(_written, config.nav) if entry]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Load a picture when the reader comes near it: the page of results has thirty."""
    return html.replace("<img ", '<img loading="lazy" ')


def _written(entry: Any) -> Any:
    ((title, target),) = entry.items()
    if isinstance(target, list):
        return {title: [one for one in map(_written, target) if one]}
    return entry if target in (*PAGES, *MADE) or Path(ROOT, "docs", target).is_file() else None


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from other files, and from the code."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=Path(ROOT, source).read_text(encoding="utf-8")))
    for page, content in MADE.items():
        files.append(File.generated(config, page, content=content()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages. A file that is no page keeps its name."""
    own = page.file.src_uri
    source = PAGES.get(own, f"docs/{own}")
    pages = {file: name for name, file in PAGES.items()}

    def link(match: re.Match) -> str:
        mark, text, address = match.groups()
        path, hash_, anchor = address.partition("#")
        if "://" in address or not path or own in MADE:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target.split("/")[0] == "examples":
            target, hash_, anchor = "docs/examples.md", "#", Path(target).stem
        inside = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(inside, posixpath.dirname(own) or '.')}{hash_}{anchor})"

    if FIELDS in markdown:
        markdown = markdown.replace(FIELDS, config_fields())
    return LINK.sub(link, markdown)


def config_fields() -> str:
    """The table of FloraConfig's fields, from their own help."""
    from flora.fields import FloraFields
    from flora.keys import described_keys

    rows = [f"| `{key}` | {text.replace('|', chr(92) + '|')} |" for key, text in described_keys(FloraFields)]
    return "\n".join(["| field | meaning [default] |", "|---|---|", *rows])


def examples() -> str:
    """The page with every script of examples/: what its docstring says, and its code."""
    parts = ["# Examples\n\nScripts of under 100 lines. `make notebooks` makes a notebook from each.\n"]
    for script in sorted(Path(ROOT, "examples").glob("*.py")):
        if script.stem == "notebooks":
            continue
        about, *body = ast.parse(source := script.read_text(encoding="utf-8")).body
        code = "".join(source.splitlines(keepends=True)[body[0].lineno - 1 :])
        text = ast.literal_eval(about.value).strip()
        title = script.stem.replace("_", " ").capitalize()
        parts.append(f"## {title} {{#{script.stem}}}\n\n{text}\n\n```python\n{code}```\n")
    return "\n".join(parts)


def command_line() -> str:
    """The page with the help of every command, in the sections of `flora --help`."""
    from flora.cli import COMPLETION, SECTIONS, main

    head = "# The command line\n\nA mistake prints one line that names it, with exit code 2.\n\n"
    parts = [f"{head}```text\n{fill(COMPLETION, WIDTH)}\n```\n"]
    for section, names in SECTIONS.items():
        parts.append(f"## {section}\n")
        for name in names:
            command = main.get_command(click.Context(main), name)
            if command is not None:
                parts += [f"### flora {path}\n\n```text\n{text}\n```\n" for path, text in _helps(command, name)]
    return "\n".join(parts)


def _helps(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    context = click.Context(command, info_name=f"flora {path}", terminal_width=WIDTH, max_content_width=WIDTH)
    if not isinstance(command, click.Group):
        yield path, command.get_help(context)
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        if inner is not None:
            yield from _helps(inner, f"{path} {name}")


MADE = {"examples.md": examples, "command-line.md": command_line}  # pages that are made from code
