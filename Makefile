# `make demo` and `make test` need nothing but Python >= 3.11: they make .venv themselves and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-core check bench campaigns mutants experiment clean

demo: $(READY)
	$(BIN)/distrust demo --out runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TEST)

test-core:
	scripts/test_core.sh

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_names.py src campaigns benchmarks experiments scripts examples tests
	$(BIN)/python scripts/audit.py

bench: $(READY)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.checkpoints $(BENCH)

campaigns: $(READY)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[campaigns]'
	$(BIN)/python -m campaigns $(CAMPAIGNS)

mutants: $(READY)
	$(BIN)/python scripts/mutants.py $(MUTANTS)

experiment: $(READY)
	$(BIN)/python -m experiments.weighting --out runs/weighting --write-docs docs/weighting.md $(EXPERIMENT)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 2.5 GB, a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-core build dist
