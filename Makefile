# Every target sets up what it needs: a virtual environment in .venv with the pinned packages of constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

export OMP_WAIT_POLICY := passive

.PHONY: demo test lint types check slow wheel clean

demo: $(READY)  ## learn five tasks in three stages, beside plain fine-tuning; writes runs/demo/run/report.html
	$(BIN)/flame demo runs/demo

test: lint types check  ## everything that must hold: style, types, tests, examples in docstrings and README

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

check: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --doctest-modules src tests

slow: $(READY)  ## the long proofs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow tests

wheel: $(READY)  ## dist/flame_moe-*.whl
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
