# `make demo` and `make test` need nothing but Python >= 3.11: they make .venv themselves and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
OLDEST_TRAINERS := .venv-oldest-trainers
# One more than there are cores: tests wait for disks and processes.
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
SUITE = -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-core test-oldest test-oldest-trainers check bench gpu has-gpu campaigns mutants experiment clean

demo: $(READY)
	$(BIN)/distrust demo --out runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE) $(TEST)

test-core:
	scripts/test_core.sh

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(SUITE) $(TEST)

test-oldest-trainers: $(OLDEST_TRAINERS)/.ready
	OMP_NUM_THREADS=1 $(OLDEST_TRAINERS)/bin/python -m pytest $(addprefix tests/,integrations/test_attach.py \
	  integrations/test_interrupted_trainers.py integrations/test_disturbed_trainers.py engines/test_conformance.py) $(TEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_names.py src campaigns benchmarks experiments scripts examples tests
	$(BIN)/python scripts/audit.py

bench: $(READY)
	-$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.checkpoints $(BENCH)

gpu: has-gpu $(READY)
	-$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[cuda]' torch-checkpointing
	$(BIN)/python -m benchmarks.gpu --out runs/gpu $(GPU)

# A prerequisite of its own, before minutes of installing.
has-gpu:
	@$(if $(filter cpu --device=cpu --show,$(GPU)),true,nvidia-smi -L) >/dev/null 2>&1 || \
	  { echo "nvidia-smi finds no GPU here; without one: make gpu GPU='--device cpu --tiny'" >&2; exit 1; }

campaigns: $(READY)
	-$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[campaigns]'
	$(BIN)/python -m campaigns $(CAMPAIGNS)

mutants: $(READY)
	$(BIN)/python scripts/mutants.py $(MUTANTS)

experiment: $(READY)
	$(BIN)/python -m experiments.weighting --out runs/weighting --write-docs docs/weighting.md $(EXPERIMENT)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 2.5 GB, a few minutes"
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[train,dev]'
	touch $(READY)

# The first pin of a name counts. PyPI has torch 2.11 for Linux with the libraries of CUDA only; it runs without a GPU.
$(OLDEST)/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	"$$(scripts/find_python.sh 3.12)" -m venv --clear $(OLDEST)
	awk -F== '!pinned[$$1]++' constraints-oldest.txt constraints.txt > $(OLDEST)/constraints.txt
	@echo "Installing into $(OLDEST): downloads 3.2 GB (2.7 GB of it torch and CUDA), needs 6.4 GB; some minutes"
	$(OLDEST)/bin/python $(INSTALL) --constraint $(OLDEST)/constraints.txt --editable '.[train,dev]'
	touch $(OLDEST)/.ready

$(OLDEST_TRAINERS)/.ready: constraints-oldest-trainers.txt
	$(PYTHON) -m venv --clear $(OLDEST_TRAINERS)
	@echo "Installing into $(OLDEST_TRAINERS): about 1.5 GB, a few minutes"
	$(OLDEST_TRAINERS)/bin/python $(INSTALL) --constraint constraints-oldest-trainers.txt \
	  --editable . torch transformers trl peft datasets pytest hypothesis pytest-xdist
	touch $(OLDEST_TRAINERS)/.ready

clean:
	rm -rf $(VENV) .venv-core $(OLDEST) $(OLDEST_TRAINERS) build dist
