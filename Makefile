# `make demo` and `make test` create the environment first; there is no other setup.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick-tests test-all faults browser lint docs bench clean

# What Python has compiled is kept: the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

CONSTRAINTS := --constraint constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)

# torch comes from pip, whose settings may name a build for the CPU; uv does not read them.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile "torch==2.13.0" uv
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) --editable ".[plots]"
	touch $@

# uv installs the 150 packages of the tests five times as fast, where it reaches an index; otherwise pip does.
DEV := --editable ".[dev,bench,eval,plots,judge,deepspeed]"
$(VENV)/ready: $(VENV)/torch pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(CONSTRAINTS) $(DEV) || $(PIP) --no-compile $(DEV)
	touch $@ $(VENV)/installed

demo: $(VENV)/installed  ## which words made the difference, and a policy: the built-in data and the default model
	$(BIN)/tokenward run recipes/quickstart.yaml

# The tests' models are tiny, so two processes are faster than two threads. Tests of a file share their fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test:  ## lint, types and the tests, but for those that take half a minute each
	@$(MAKE) --no-print-directory -j2 $(VENV)/ready browser
	@$(MAKE) --no-print-directory -j2 lint quick-tests

quick-tests: $(VENV)/ready
	$(PYTEST) -m "not slow"

test-all: $(VENV)/ready lint browser  ## every test, and every case of the engines of several processes
	TOKENWARD_ENGINES=all $(PYTEST)

faults: $(VENV)/ready  ## kills, full disks and changed files, about an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.faults

browser:  ## install chromium for the tests of the report's page, if possible
	@scripts/browser.sh

lint: $(VENV)/ready
	$(BIN)/ruff check src tests scripts benchmarks studies
	$(BIN)/ruff format --check src tests scripts benchmarks studies
	$(BIN)/pyright

docs: $(VENV)/ready  ## the documentation site, in build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "open build/docs/index.html"

# Each command writes benchmarks/results, the last one docs/performance.md. Do not use the machine meanwhile.
bench: $(VENV)/ready  ## every measurement of docs/performance.md, about an hour on two idle cores
	$(BIN)/python -m benchmarks.training_step --precision fp32
	$(BIN)/python -m benchmarks.training_step --precision bf16
	$(BIN)/python -m benchmarks.training_step --precision bf16 --checkpointing
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.listwise_k4
	$(BIN)/python -m benchmarks.machine_share
	$(BIN)/python -m benchmarks.vocabulary
	$(BIN)/python -m benchmarks.sequence_length
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.bfloat16
	$(BIN)/python -m benchmarks.gpu_step
	$(BIN)/python -m benchmarks.table

clean:
	rm -rf $(VENV) build dist *.egg-info
