# Each target does its own set-up; `make demo` and `make test` work on a fresh clone.
#
#   make setup          the CPU's build of torch (the default)
#   make setup GPU=1    the CUDA build on Linux, 2.7 GB instead of 0.2; GPU=0 goes back
#
# docs/setup.md says what is downloaded, from where, and how long it takes.
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
BIN := .venv/bin
ARGS ?=
UV ?= $(shell command -v uv)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# The choice is kept in .venv: `make test` after `make setup GPU=1` uses the CUDA build too.
MADE := $(firstword $(notdir $(wildcard .venv/made-for-gpu .venv/made-for-cpu)))
CHOICE := $(if $(filter 0,$(GPU)),cpu,$(if $(GPU),gpu,$(or $(MADE:made-for-%=%),cpu)))

.PHONY: setup lock demo test test-slow test-soak check format clean always
# A Python that was asked for by name is held against the one that .venv has.
ASKED := $(if $(filter file,$(origin PYTHON)),,always)

setup: .venv/made-for-$(CHOICE)

.venv/made-for-$(CHOICE): pyproject.toml requirements.lock constraints.txt tools/install.py $(ASKED)
	@$(PYTHON) tools/install.py --torch $(CHOICE) --torch-index '$(TORCH_INDEX)' --uv '$(UV)'

# Resolve anew after a change of the dependencies in pyproject.toml or of the pins in constraints.txt.
lock:
	$(PYTHON) tools/lock.py --uv '$(UV)'

demo: setup
	$(BIN)/flowreel demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow --durations=30 $(ARGS)

test-soak: setup
	$(BIN)/python -m pytest -m soak --durations=0 $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rules.py tests/test_claims.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache *.egg-info build
