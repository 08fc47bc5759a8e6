"""docs/results.md says what the committed rows say."""

from pathlib import Path

import pytest

from flora_lab.analysis import rows, tables

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "results").glob("*.jsonl"))


def test_there_are_rows():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_tables_are_those_of_the_rows(file):
    found = rows.results(rows.read([file]))
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert {result.task for result in found} == {file.stem}
    assert tables.comparison(found).markdown() in page
    assert all(len(result.runs) == len({run["seed"] for run in result.runs}) for result in found)
