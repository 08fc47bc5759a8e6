"""docs/results.md says what the committed rows say."""

from pathlib import Path

import pytest

from flora_lab.analysis import tables
from flora_lab.analysis.results import summarise
from flora_lab.analysis.rows import read

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "results").rglob("*.jsonl"))


def test_there_are_rows():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_tables_are_those_of_the_rows(file):
    results = summarise(read([file]))
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert {result.job for result in results} == {file.stem}
    assert tables.comparison(results).markdown() in page
    if file.parent.name == "diffusion":
        assert tables.further(results).markdown() in page
    assert all(len(result.rows) == len({row["seed"] for row in result.rows}) for result in results)
