"""docs/results.md says what the committed rows say."""

from pathlib import Path

import pytest
import yaml

from flora_lab.analysis import analyse, tables
from flora_lab.analysis.results import summarise
from flora_lab.analysis.rows import read
from flora_lab.settings import Comparison

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


def test_every_figure_is_on_the_page():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    figures = {str(file.relative_to(DOCS)) for file in (DOCS / "results").rglob("*.png")}
    assert {figure for figure in figures if f"]({figure})" not in page} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_methods_that_are_compared_try_three_rates_or_more(file):
    keys = yaml.safe_load((DOCS.parent / "configs" / f"{file.stem}.yaml").read_text())  # not all packages are here
    assert len(keys["methods"]) == 1 or len(keys.get("comparison", {}).get("rates", Comparison().rates)) >= 3


def test_made_anew_the_tables_stay_as_they_are(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((DOCS / "results.md").read_text(encoding="utf-8"), encoding="utf-8")
    files = [file for file in FILES if file.parent.name == "diffusion"]
    analyse(files, tmp_path, page)
    assert page.read_text(encoding="utf-8") == (DOCS / "results.md").read_text(encoding="utf-8")
    number = tables.further(summarise(read(files[:1]))).lines[0][2]
    lost = page.read_text(encoding="utf-8").replace(f" {number} |", " 9.9999 |")
    assert "9.9999" in lost
    page.write_text(lost, encoding="utf-8")
    analyse(files, tmp_path, page)
    assert "9.9999" not in page.read_text(encoding="utf-8")
