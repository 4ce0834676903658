# 3D MedDiffusion. `make help` lists the targets; every one makes the environment it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_DIR ?= demo

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow fuzz gpu-check lint format demo demo-short demo-control clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv from requirements.txt (done by all other targets too)

# .ready is written last: an interrupted installation goes on at the next call.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python %d.%d found, 3.11 or newer needed: make PYTHON=/path/to/python3 …" % sys.version_info[:2])'
	@echo "== environment: .venv (some minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

test: lint ## lint and all tests but the slow ones (CPU, offline), one process a core
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal -m "not slow and not gpu"

test-slow: $(READY) ## the slow tests
	$(BIN)/python -m pytest -q -m slow

fuzz: $(READY) ## odd files to all readers for 20 minutes, with another seed each time (FUZZ_SECONDS=300 for each door)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-300} FUZZ_SEED=$${FUZZ_SEED:-random} $(BIN)/python -m pytest -q -s tests/fuzz

# The Python whose torch sees a GPU: users of conda have one, which may lack the imaging libraries. Else .venv.
gpu-check: ## what this machine's GPU reaches, in 8 minutes, by PYTHON (python3) if its torch sees the GPU, else by .venv
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(PYTHON) evaluation/gpu_check.py $(OPTIONS); \
	else $(MAKE) --no-print-directory setup && $(BIN)/python evaluation/gpu_check.py $(OPTIONS); fi

lint: $(READY) ## ruff: check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY) ## phantoms to generated volumes in a quarter of an hour, with picture and report (DEMO_DIR=demo)
	@$(BIN)/python evaluation/demo.py --output-dir $(DEMO_DIR)

demo-short: $(READY) ## the same stages with a few steps each: shows that they run, not what they reach
	@$(BIN)/python evaluation/demo.py --output-dir $(DEMO_DIR)-short --short

demo-control: $(READY) ## after `make demo`: sparse-view CT, fast MRI and masks, in 12 minutes (DEMO_DIR=demo)
	@$(BIN)/python evaluation/demo_control.py --demo $(DEMO_DIR) --output-dir $(DEMO_DIR)/control

clean: ## remove the environment and the demo's files
	rm -rf $(VENV) $(DEMO_DIR) $(DEMO_DIR)-short .pytest_cache .ruff_cache
