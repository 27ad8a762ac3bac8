# Every target sets up what it needs in .venv; nothing has to be activated.
#
#   make test PYTHON=python3.12
#   make test TORCH_INDEX=URL    (PyTorch's index of CPU builds: a much smaller torch on Linux without a GPU)

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
RUN := OMP_NUM_THREADS=1 $(PYTEST) -n auto --maxprocesses=4

.DEFAULT_GOAL := help
.PHONY: help install demo test fast slow lint format bench wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Set up .venv with the package and everything for development

# torch goes first and by itself: left to the resolver, another version of it could be fetched, gigabytes at a time.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("hf-compressm needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Use: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED) ## Train a small model on text, shrink it on the way, reload it, generate (about 5 minutes)
	$(BIN)/python examples/pretrain_clm.py --output_dir outputs/demo
	$(BIN)/python examples/generate.py --model outputs/demo

test: $(INSTALLED) ## Run the tests, without the slow ones
	$(RUN)

fast: $(INSTALLED) ## Run the tests of mathematics, scans, reducers and surgery only (about a minute)
	$(RUN) tests/mor tests/ops tests/reducers tests/surgery tests/test_config.py tests/test_imports.py tests/test_search.py \
	  tests/test_compression.py tests/test_observation.py tests/test_report.py

slow: $(INSTALLED) ## Run the slow tests only
	$(RUN) -m slow

lint: $(INSTALLED) ## Check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED) ## Repair style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## Run the benchmarks
	$(BIN)/python -m benchmarks

wheel: $(INSTALLED) ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist outputs .pytest_cache .ruff_cache
