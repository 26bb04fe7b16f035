# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up first; a second run installs nothing.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOOR := $(shell sed -n 's/^requires-python = ">=\([0-9.]*\)"$$/\1/p' pyproject.toml)
PEFT_VERSIONS := 0.18.1 0.19.1 0.20.0 0.21.2
PEFT_OLDEST := $(shell sed -n 's/^ *"peft>=\([0-9.]*\),.*/\1/p' pyproject.toml)

PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# One thread in each worker: the tests are many small operations, and threads of several workers would only wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest test-peft lint format accuracy bench clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## Make .venv with everything in it

demo: $(STAMP) ## Run the main job on two simulated cities; results in demo/
	$(BIN)/stlora demo $(ARGS)

test: $(STAMP) ## Run the tests (some of them: make test ARGS="-k layout")
	$(PYTEST) $(ARGS)

test-oldest: $(VENV)/peft-$(PEFT_OLDEST)/peft ## Run the tests on the oldest supported peft
	PYTHONPATH=$(VENV)/peft-$(PEFT_OLDEST) $(PYTEST) $(ARGS)

test-peft: $(PEFT_VERSIONS:%=$(VENV)/peft-%/peft) ## Run the contract tests on every supported peft
	set -e; for v in $(PEFT_VERSIONS); do \
	  PYTHONPATH=$(VENV)/peft-$$v $(PYTEST) tests/test_peft_*.py $(ARGS); \
	done

lint: $(STAMP) ## Check style, docstrings, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(STAMP) ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

accuracy: $(STAMP) ## Compare every method on every pair of cities (a small one in minutes: make accuracy ARGS=--quick)
	$(BIN)/python benchmarks/accuracy/run.py $(ARGS)

bench: $(STAMP) ## Run the speed benchmarks and compare their ratios with the committed ones
	$(BIN)/python benchmarks/bench.py $(ARGS)

clean: ## Remove results and caches
	rm -rf build demo dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(FLOOR)".split("."))))' 2>/dev/null || { \
	  echo "make: PYTHON='$(PYTHON)' cannot run this package." >&2; \
	  echo "  expected: CPython $(FLOOR) or newer" >&2; \
	  echo "  got:      $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "  to fix:   make $(or $(MAKECMDGOALS),install) PYTHON=/path/to/python$(FLOOR)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[all,dev]'
	$(PIP) --no-deps torch-geometric-temporal
	@touch $@

# Laid over the newest one instead of a second .venv: peft is one pure package, torch is not.
$(VENV)/peft-%/peft: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(@D) peft==$*
	@touch $@
