# The commands: `make run`, `make test`, `make docs`. Each makes .venv if it is absent.
VENV := .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
# By version and sha256. The lock files say all that is needed; nothing is built from what they do not say.
LOCKED := $(INSTALL) --require-hashes --no-deps --no-build-isolation --requirement
LOCKS := $(addprefix requirements/,build.lock run.lock torch-cpu.lock torch.lock)
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

$(VENV)/.installed: pyproject.toml $(LOCKS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) requirements/build.lock
	$(LOCKED) requirements/run.lock
	$(LOCKED) requirements/torch-cpu.lock 2> /dev/null || $(LOCKED) requirements/torch.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	$(PIP) check
	touch $@

$(DEVELOPMENT): $(VENV)/.installed constraints.txt
	$(INSTALL) --constraint constraints.txt --editable ".[flower,serve]" --group dev
	touch $@

clean:
	rm -rf $(VENV) site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
