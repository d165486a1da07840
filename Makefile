# `make bench` and `make test` work on a fresh machine with Python >= 3.11: each makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: bench test test-fast lint format docs clean

bench: .venv/installed
	$(BIN)/python benchmarks/run_all.py --profile quick --jobs 2

test: .venv/installed-test lint
	$(BIN)/python -m pytest -n auto --dist worksteal
	$(BIN)/python -m pytest -m llm

# Strong tests that take half a minute together: chosen by what they prove and by `pytest --durations=0`.
FAST := engine groups guided lock_env positions ppo tabular tasks wrappers
test-fast: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not llm" $(FAST:%=tests/test_%.py)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/; needs no network.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and by its own pin: a range alone would fetch a CUDA build of several gigabytes.
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[report]"
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv runs build site *.egg-info
