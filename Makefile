# Every target sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help quickstart test test-oldest test-slow lint wheel clean

help:
	@echo "make quickstart   train a small teacher, distil it to one step, measure both, write runs/digits/report.html"
	@echo "make test         the test suite on the newest releases of what it depends on (minutes)"
	@echo "make test-oldest  on the oldest that pyproject.toml allows, in .venv-oldest"
	@echo "make test-slow    the tests that are left out of it"
	@echo "make lint         ruff and mypy"
	@echo "make wheel        dist/: the wheel that pip installs, and the sdist it is built of"
	@echo "make clean        remove .venv, .venv-oldest and caches (runs/ stays)"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing the dependencies into .venv (several GB: a few minutes) ..."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	@echo "Installing the oldest dependencies into .venv-oldest (several GB: a few minutes) ..."
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[dev]'
	@touch $@

quickstart: .venv/installed
	$(BIN)/python scripts/quickstart.py

test: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-oldest: .venv-oldest/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/installed
	$(BIN)/python -m build

clean:
	rm -rf .venv .venv-oldest .ruff_cache .mypy_cache .pytest_cache *.egg-info
