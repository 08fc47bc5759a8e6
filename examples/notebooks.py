"""Make a notebook from each script in this folder:

    python examples/notebooks.py NOTEBOOKS

Needs `pip install nbformat`. The script's docstring becomes text, each function a cell, and its command line the last
cell: the arguments are those of the docstring's example, for you to change.
"""

import ast
import re
import shlex
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent


def notebook(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script. It runs in the folder of the script's repository."""
    source = script.read_text(encoding="utf-8")
    about, *nodes = ast.parse(source).body
    text = ast.literal_eval(about.value)  # type: ignore[attr-defined]
    parts: list[str] = []
    for node in nodes:
        code = ast.get_source_segment(source, node) or ""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not parts:
            decorated = [f"@{ast.get_source_segment(source, one)}\n" for one in getattr(node, "decorator_list", ())]
            parts.append("".join(decorated) + code)
        elif isinstance(node, ast.If):  # if __name__ == "__main__"
            body = "\n".join(ast.get_source_segment(source, line) or "" for line in node.body)
            usage = re.search(r"^ +(?:python|accelerate launch).*?(\S+\.py.*?)(?:  +#.*)?$", text, re.MULTILINE)
            words = shlex.split(usage[1]) if usage else [script.name]
            parts.append(f"import sys\n\nsys.argv = {words!r}\n{body}")
        else:
            parts[-1] += f"\n{code}"
    title = f"# {script.stem.replace('_', ' ').capitalize()}\n\n{text.strip()}"
    return new_notebook(cells=[new_markdown_cell(title), *map(new_code_cell, parts)])


def main(out: str) -> None:
    """Write all of them."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted(HERE.glob("*.py")):
        if script.name != Path(__file__).name:
            nbformat.write(notebook(script), folder / f"{script.stem}.ipynb")
            print(folder / f"{script.stem}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1])
