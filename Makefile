# Every target makes the environment it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests share what they have prepared, and the slowest files come first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install train test test-all test-gpu lint format reference clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "clip_exp needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

install: $(VENV)/installed ## make .venv with clip_exp and its tools

train: install ## train a CLIP on handwritten digits, in minutes on a CPU
	$(BIN)/python train.py experiment=digits resume=never

test: install ## run the tests that hold every promise once, in ten minutes on two cores
	$(PYTEST) -m 'not exhaustive'

test-all: install ## also run full-size models, more damaged inputs, and every pair of options
	$(PYTEST)

test-gpu: install ## run the tests that need a GPU; the others skip them without one
	$(BIN)/python -m pytest -m gpu

lint: install ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: install ## write the pages of all keys, docs/reference/, from the schema
	$(BIN)/python -m clip_exp.config.reference docs/reference

clean: ## remove caches (not outputs/, not .venv)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist
