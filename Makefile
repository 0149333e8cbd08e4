# demo: the two-minute tour.  test: all tests, set-up included.  check: format, lint, types, floors.
# bench: figures of docs/ and README, measured here.  docs: generated documents.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench docs

demo: .venv/ready
	$(BIN)/pertoken compare examples/shop.yaml --html out/shop.html

test: .venv/ready
	@$(PYTHON) tests/system_packages.py
	$(BIN)/pytest -n 2

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: .venv/ready
	$(BIN)/python docs/generate.py

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PerToken needs Python 3.11 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
