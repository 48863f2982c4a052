# `make demo` and `make test` are all a newcomer needs. Stamp files in .venv keep a second run from doing work twice.

PYTHON ?= python3
BIN    := .venv/bin
QUESTION ?= What is the capital of France, and what is it known for?

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo chat test lint format types check clean

help:
	@echo "make demo    fetch a small model, convert it to MLA, answer one question"
	@echo "make chat    the same model, interactively"
	@echo "make test    run the test suite"
	@echo "make lint    ruff: rules and formatting     make format  apply them"
	@echo "make types   basedpyright                   make check   test, lint and types"
	@echo "make clean   remove .venv and tool caches (downloaded models stay in the user's cache)"
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made with"

demo: .venv/run.stamp
	@$(BIN)/lowlat chat --temperature 0 --once "$(QUESTION)"

chat: .venv/run.stamp
	@$(BIN)/lowlat chat

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/dev.stamp
	$(BIN)/basedpyright

check: test lint types

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("lowlat needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Creating .venv"
	@$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing lowlat into .venv (PyTorch is most of it; a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/dev.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing lowlat with its development tools into .venv"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch .venv/run.stamp $@
