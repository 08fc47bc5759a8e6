# make demo       set everything up and run the main job
# make test       set everything up and run every test
# make test-fast  the library's contracts alone: no browser, no Ray, no jobs
# make lint       style, format and types
# make results    every table and figure of docs/results.md, from the committed rows
# make notebooks  notebooks/, one made from each script in examples/
# make docs       the documentation site, in site/; a broken link is an error
# Another Python than python3: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint results docs notebooks install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/flora train configs/digits.yaml

test: install
	@command -v chromedriver >/dev/null || { echo "chromedriver not found: the report page is tested in Chromium (Debian: apt-get install chromium chromium-driver)" >&2; exit 1; }
	$(BIN)/pytest -n 2

test-fast: install
	$(BIN)/pytest -n 2 tests/flora tests/test_walls.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

results: install
	$(BIN)/flora analyse docs/results/*.jsonl --out docs/results --into docs/results.md
	$(BIN)/flora analyse docs/results/diffusion/*.jsonl --out docs/results/diffusion --into docs/results.md

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: install
	$(BIN)/python examples/notebooks.py notebooks

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: flora needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"{sys.executable} is Python {sys.version.split()[0]}: flora needs 3.11 or newer, e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,docs]'
	touch $@
