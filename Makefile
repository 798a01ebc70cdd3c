# make quickstart   the whole job on a laptop: text in, PoSE training, a longer window out
# make test         all tests          make unit   the ones that take seconds
# make bench        the benchmarks, half an hour; OUT=folder for the figures
# make lint         ruff and mypy      make clean  removes .venv and quickstart/
# Each sets up .venv when it is missing, with Python 3.11 or newer: make PYTHON=python3.12 ...

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Installed first. On a machine without a GPU whose index offers only CUDA builds, say
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" ...
TORCH ?= torch==2.13.0
BIN := .venv/bin

export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart test unit bench lint clean

quickstart: $(BIN)/.ready
	bash examples/quickstart.sh

test: $(BIN)/.ready
	python -m pytest

unit: $(BIN)/.ready
	python -m pytest tests/unit_tests

OUT ?= runs/benchmarks
BENCHMARKS := step_overhead full_length resume dataset convert preprocess

bench: $(BIN)/.ready
	mkdir -p $(OUT)
	set -e; for name in $(BENCHMARKS); do \
	    echo "== $$name"; python benchmarks/$$name.py --output $(OUT)/$$name.json; done

lint: $(BIN)/.ready
	ruff format --check .
	ruff check .
	mypy

clean:
	rm -rf .venv quickstart

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or newer, \
	not " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
