# Two commands are all the set-up there is: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint real clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,bench,eval,plots]"
	touch $@

demo: $(VENV)/ready  ## the main job: SePO on the built-in data with the default model
	$(BIN)/tokenward run recipes/quickstart.yaml

test: $(VENV)/ready lint  ## lint, types and every test
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info
