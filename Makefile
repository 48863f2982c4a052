# `make demo` and `make test` are the two to know. Stamp files in .venv record what is installed.

PYTHON ?= python3
BIN    := .venv/bin
QUESTION ?= What is the capital of France, and what is it known for?

# Sources of the native module. Python files need no build: the install is editable.
BUILT_FROM := pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
SANITIZED := build/sanitized

# One more than the cores, as tests wait for processes of their own; at most four.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4)))

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo chat serve test test-all soak sanitize lint format types check docs clean

help:
	@echo "make demo    fetch a small model, convert it to MLA, answer one question (first: about ten minutes)"
	@echo "make chat    the same model, interactively"
	@echo "make serve   the same model as a server with a chat page"
	@echo "make test    run the quick test suite (every package, under 8 minutes on two cores)"
	@echo "make test-all  run the whole test suite"
	@echo "make soak    a minute of a server under load"
	@echo "make sanitize  run the tests of the native kernels with memory and undefined-behaviour checks"
	@echo "make lint    ruff: rules and formatting     make format  apply them"
	@echo "make types   basedpyright                   make check   test, lint and types"
	@echo "make docs    build the documentation site into build/site"
	@echo "make clean   remove .venv and tool caches (downloaded models stay in the user's cache)"
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made with"

demo: .venv/run.stamp
	@$(BIN)/lowlat chat --temperature 0 --once "$(QUESTION)"

chat: .venv/run.stamp
	@$(BIN)/lowlat chat

serve: .venv/dev.stamp
	@$(BIN)/lowlat serve

# Every package, without the tests marked slow; test-all is the whole suite.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20 $(PYTEST_ARGS)

# A minute of a server under load; half an hour is benchmarks/soak.py's default.
soak: .venv/dev.stamp
	$(BIN)/python benchmarks/random_checkpoint.py tiny build/tiny
	$(BIN)/python benchmarks/soak.py build/tiny --minutes 1

# tests/native/test_native.py and test_thread_pool.py start processes of their own, which load the installed module. Reports go
# to stderr, which pytest may not keep; leaks are not looked for, as CPython has many.
sanitize: .venv/dev.stamp
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(SANITIZED) . \
		--config-settings build-dir=$(SANITIZED) --config-settings cmake.define.LOWLAT_SANITIZE=ON
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m tests.native.sanitized $(SANITIZED) tests/native --capture sys --ignore tests/native/test_native.py \
		--ignore tests/native/test_thread_pool.py --ignore tests/native/test_batch_invariance.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/dev.stamp
	$(BIN)/basedpyright

check: test-all lint types

# Fails for a link that leads nowhere and for a page that the navigation lacks.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("lowlat needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Creating .venv"
	@$(PYTHON) -m venv .venv

.venv/run.stamp: $(BUILT_FROM) | $(BIN)/python
	@echo "Installing lowlat into .venv (PyTorch's download and the C++ build: about ten minutes on two cores)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/dev.stamp: $(BUILT_FROM) | $(BIN)/python
	@echo "Installing lowlat with its development tools into .venv (about ten minutes on two cores)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable ./lab
	@touch .venv/run.stamp $@

# The extra's packages alone: the site is made from the source, without lowlat installed.
.venv/docs.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing MkDocs into .venv"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv/docs.txt
	@$(BIN)/python -m pip install --quiet --requirement .venv/docs.txt
	@touch $@
