# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_OUTPUT ?= outputs/demo

KILLS ?= 30

.PHONY: demo test slow kill-test lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,trl]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ropo demo --output_dir $(DEMO_OUTPUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

kill-test: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/kills.py --kills $(KILLS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) outputs
