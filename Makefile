# `make demo` and `make test` are all a new checkout needs; `make help` lists the rest.

# Settings, for instance: make test PYTHON=python3.12 PYTEST_ARGS="-m 'not slow'"
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# An environment may be shared by several checkouts (.ci/run does so): each must import its own lth_plugins, in
# the scripts it starts, too.
export PYTHONPATH := $(CURDIR)
MAKEFLAGS += --no-print-directory

.PHONY: help setup demo demo-photos demo-full test soak bench docs lint format wheel detectron2 clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 12
	@echo "settings: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS='$(PYTEST_ARGS)' DETECTRON2_WHEELS=folder"

setup:  ## build the virtual environment, or bring it up to date
	@$(PYTHON) .ci/venv.py $(VENV)

demo: setup  ## find tickets, transfer them, and write runs/demo/report.html
	$(BIN)/python tools/demo.py

demo-photos: setup  ## tickets of zoo/ on street scenes and blood cells, which datasets/ must have (docs/photos.md)
	$(BIN)/python tools/demo.py --config configs/study/demo_photos.yaml --out runs/demo_photos

demo-full: setup  ## the same with tickets of three pre-trainings, on harder scenes: half an hour
	$(BIN)/python tools/demo.py --config configs/study/demo_full.yaml --out runs/demo_full

test: lint  ## lint, then run the whole test suite
	$(BIN)/python -m pytest --timeout=600 -n 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

soak: setup  ## the tests that take minutes: kill after kill, file after file
	$(BIN)/python -m pytest --soak --timeout=3600 $(PYTEST_ARGS)

bench: setup  ## measure beside the peers, and write benchmarks/RESULTS.md: half an hour
	$(BIN)/python benchmarks/run.py

docs: setup  ## build the documentation into site/: open site/index.html
	$(BIN)/mkdocs build --strict

lint: setup  ## ruff, mypy, and import-linter on the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup  ## build the package into dist/
	$(BIN)/python -m build --wheel --no-isolation

detectron2: ## look again for a detectron2 that was missing
	@$(PYTHON) .ci/venv.py $(VENV) --retry-detectron2

clean:  ## remove what builds and tests leave behind (not runs/, not the environment)
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment, too
	rm -rf $(VENV) $(VENV).lock
