# `make demo` and `make test` do all their own set-up; nothing else is needed but Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests that start several processes are dealt out to two workers (tests/conftest.py), which suits two cores and more.
PYTEST_ARGS ?= -n 2 --dist loadgroup

# What `make fuzz` is told, e.g. FUZZ="seed=7 target=tar_shard" (tests/fuzz/run.py); alone it writes the table of results.
FUZZ ?= output=benchmarks/results/fuzz.json

.PHONY: help demo test fuzz setup lint format clean

help:
	@echo "make demo    a clip goes in, a 129-frame adapter and its videos come out: on a CPU, in minutes"
	@echo "make test    linters, types and all tests"
	@echo "make fuzz    mutated inputs through every reader of foreign files: 170,000 cases, minutes"
	@echo "make setup   the virtual environment alone, in $(VENV)"
	@echo "make format  repair formatting and what ruff can repair"
	@echo "make clean   remove demo/ and caches; the virtual environment stays"

setup: $(STAMP)

# Never without the constraints: a bare range of torch takes whatever build is newest.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the versions of constraints.txt into $(VENV), once; this takes minutes"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,ray,browser]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz.run $(FUZZ)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo .mypy_cache .pytest_cache .ruff_cache build dist
