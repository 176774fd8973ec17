# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_OUTPUT ?= outputs/demo

KILLS ?= 30
# Processes that share the tests, each with one thread and up to 2 GB.
JOBS ?= 2
# 5,000 rows, the same ones each time; `make fuzz ROWS=100000 WRITE=1` draws new ones, for docs/reliability.md.
ROWS ?= 5000

.PHONY: demo test slow distributed-test fuzz kill-test help-pages golden lint measure clean

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
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# DeepSpeed builds its operators when they are asked for, and these tests ask for none: no compiler is needed. Its
# setup imports torch, hence no isolation.
$(VENV)/.installed-deepspeed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

# Two and four processes on CPUs: DDP, FSDP2, ZeRO-2 and ZeRO-3 give what one process gives; prints what each holds.
distributed-test: $(VENV)/.installed-deepspeed
	$(BIN)/python -m pytest -m distributed -rs -s

fuzz: $(VENV)/.installed-dev
	FUZZ_ROWS=$(ROWS) FUZZ_WRITE=$(WRITE) $(BIN)/python -m pytest -m slow --timeout 0 tests/fuzz

kill-test: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/kills.py --kills $(KILLS)

# What `ropo X --help` prints, and the names of all options; tests/unit/cli/test_help.py says when they are out of date.
help-pages: $(VENV)/.installed-dev
	$(BIN)/python -m ropo.cli.help

# The reports, sentences and outcomes that tests/unit/report/test_golden.py compares; read the difference.
golden: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --regenerate tests/unit/report/test_golden.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Size, readability and start of the code; `make measure BEFORE=COMMIT` puts another commit beside it.
measure: $(VENV)/.installed-dev
	$(BIN)/python tools/measure.py $(if $(BEFORE),--before $(BEFORE))

clean:
	rm -rf $(VENV) outputs
