# The commands: `make run`, `make test`, `make docs`. Each makes .venv if it is absent.
VENV := .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEVELOPMENT := $(VENV)/.installed-development
WORKERS ?= 2
# A file's tests stay in one process: they share its models and its Ray.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile
export OMP_NUM_THREADS ?= 1

.PHONY: run test fast lint docs clean

run: $(VENV)/.installed
	$(VENV)/bin/kilofed run tiny

test: lint
	$(PYTEST) --verbose --durations=15

fast: lint
	$(PYTEST) -m "not slow"

lint: $(DEVELOPMENT)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(DEVELOPMENT)
	$(VENV)/bin/zensical build --clean --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet "pip>=25.1"
	$(PIP) --editable .
	touch $@

$(DEVELOPMENT): $(VENV)/.installed
	$(PIP) --editable ".[flower,serve]" --group dev
	touch $@

clean:
	rm -rf $(VENV) site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
