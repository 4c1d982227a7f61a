# Two commands: `make run` and `make test`. Both make .venv if it is absent.
VENV := .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEVELOPMENT := $(VENV)/.installed-development
export OMP_NUM_THREADS ?= 1

.PHONY: run test fast lint clean

run: $(VENV)/.installed
	$(VENV)/bin/kilofed run tiny

test: lint
	$(VENV)/bin/python -m pytest --verbose --durations=15

fast: lint
	$(VENV)/bin/python -m pytest -m "not slow"

lint: $(DEVELOPMENT)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet "pip>=25.1"
	$(PIP) --editable .
	touch $@

$(DEVELOPMENT): $(VENV)/.installed
	$(PIP) --editable ".[flower,serve]" --group dev
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
