# Every target makes the virtual environment itself. The plain commands behind each stand in CONTRIBUTING.md.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
STATES_INSTALLED := $(VENV)/.installed-states
DOCS_INSTALLED := $(VENV)/.installed-docs
INTEGRATIONS_INSTALLED := $(VENV)/.installed-integrations

.PHONY: demo demo-ranks test test-integrations lint format bench gpu long states docs clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

$(INTEGRATIONS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev,integrations]'
	touch $@

$(STATES_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev,states]'
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(INSTALLED)  ## train, be killed, resume, compare bit for bit
	$(BIN)/stager demo --config configs/demo.yaml --out runs/demo

demo-ranks: $(INSTALLED)  ## the same on two ranks; resume on one and on four; without a log directory in /tmp
	$(BIN)/torchrun --nproc-per-node 2 --log-dir /dev/null -m stager demo --config configs/torchrun.yaml --out runs/demo-ranks

demo demo-ranks test test-integrations long states: export PYTHONDONTWRITEBYTECODE =  # pip leaves it to the first import to compile

test: $(INSTALLED)  ## lint, types and the whole suite
	$(MAKE) lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without faulthandler's dump of a test that takes long: on Python 3.11 the dump itself may end the process.
LONG := -o timeout=1800 -o faulthandler_timeout=0

long: $(INSTALLED)  ## the long versions of the crash tests
	$(BIN)/python -m pytest -m long $(LONG) -n auto --dist worksteal

test-integrations: $(INTEGRATIONS_INSTALLED)  ## the real frameworks: training runs that are killed and resumed, bit for bit
	$(BIN)/python -m pytest -m 'long or not long' $(LONG) tests/integrations tests/exporting/test_transformers.py

states: $(STATES_INSTALLED)  ## the whole corpus of states in every format, with the libraries whose tensors are in it
	$(BIN)/python -m pytest -m 'long or not long' $(LONG) tests/states tests/snapshot/test_guard.py

bench: $(BENCH_INSTALLED)  ## stager beside the other ways to checkpoint; hours; BENCH='--rounds 1 --case big' for less
	$(BIN)/python -m tests.benchmarks $(BENCH)

gpu:  ## tests and figures of the accelerator, in 8 minutes; GPU=--dry simulates one. Uses PYTHON as it is if it has what is needed
	if $(PYTHON) -c 'import torch, pytest, pytest_timeout, xxhash, pydantic, cloudpickle, psutil, typer, yaml' 2>/dev/null; \
	then $(PYTHON) -m tests.gpu $(GPU); else $(MAKE) $(INSTALLED) && $(BIN)/python -m tests.gpu $(GPU); fi

docs: $(DOCS_INSTALLED)  ## the site, into site/; a broken link or anchor fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
