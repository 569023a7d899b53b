# `make demo` and `make test` need nothing but Python >= 3.11: they make .venv themselves and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest

.PHONY: demo test test-core test-oldest check bench campaigns mutants experiment clean

demo: $(READY)
	$(BIN)/distrust demo --out runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TEST)

test-core:
	scripts/test_core.sh

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(addprefix tests/,integrations/test_attach.py \
	  integrations/test_interrupted_trainers.py integrations/test_disturbed_trainers.py engines/test_conformance.py) $(TEST)

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

$(OLDEST)/.ready: constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	@echo "Installing into $(OLDEST): about 1.5 GB, a few minutes"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
	  --editable . torch transformers trl peft datasets pytest hypothesis pytest-xdist
	touch $(OLDEST)/.ready

clean:
	rm -rf $(VENV) .venv-core $(OLDEST) build dist
