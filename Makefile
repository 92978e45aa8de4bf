# Needs Python >= 3.10 and make, nothing else. Every target sets up what it needs, in .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo-data
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint check docs bench clean

demo: .venv/.installed  ## real data in, a small model and its report out, in minutes
	$(BIN)/python examples/write_digits.py $(DEMO)/digits $(DEMO)/labels.csv
	$(BIN)/attar run $(DEMO)/digits --out $(DEMO)/run --labels $(DEMO)/labels.csv --self-steps 480 --train-steps 60 --distil-steps 150

test: .venv/.developing  ## the suite, a file at a time on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/.developing  ## the suite and the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m ""

lint: .venv/.developing  ## format, lint, types, generated docs
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

check: lint test

docs: .venv/.developing  ## docs/cli.md and docs/attar.toml from the settings
	$(BIN)/python docs/generate.py

bench: .venv/.developing  ## see benchmarks/README.md
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf .venv $(DEMO) attar-runs .pytest_cache .ruff_cache .mypy_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and alone: pip then takes the wheel the platform offers for the pinned version and leaves it in place.
.venv/.torch: constraints.txt | .venv/bin/python
	$(PIP) torch
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(PIP) -e '.[hf]'
	touch $@

.venv/.developing: .venv/.installed
	$(PIP) -e '.[dev]'
	touch $@
