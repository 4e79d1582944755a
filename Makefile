# `make compare` and `make test` do all their own set-up: Python >= 3.10 and make are enough.
PYTHON ?= python3
# Another torch than the pinned one, in a virtual environment of its own: make test TORCH=2.9.1
TORCH ?=
# Test files that run at once. More than 2 at a time is untested; 0 for --pdb or to see the output.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(2, os.cpu_count() or 1))")
PYTEST = $(BIN)/python -m pytest --doctest-modules -n $(JOBS) --dist loadfile
VENV := .venv$(addprefix -torch-,$(TORCH))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
LAB := $(VENV)/.installed-lab
STAMP := $(VENV)/.installed

.PHONY: compare gpu results reproduce-quick test test-all lint types docs format install clean

ifeq ($(TORCH),)
PINS := constraints.txt
else
# torchvision 0.(15 + n) is built for torch 2.n; triton's version is what that torch asks for.
PINS := $(VENV)-constraints.txt
VISION := 0.$(shell expr 15 + $(word 2,$(subst ., ,$(TORCH)))).*
# torchvision may be released later than the torch that it is built for.
WITHOUT_VISION = || echo "no torchvision $(VISION) can be installed: the test with timm will be skipped"
$(PINS): constraints.txt Makefile
	grep -vE '^(torch|torchvision|triton)==' constraints.txt > $@
	printf 'torch==%s\ntorchvision==%s\n' '$(TORCH)' '$(VISION)' >> $@
endif

# torch first and alone, so that its pinned wheel is chosen before anything can ask for another.
$(LAB): pyproject.toml $(PINS)
	@echo "Setting up $(VENV), once; most of the time is the download of torch"
	@echo "[1/3] a virtual environment and pip"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@echo "[2/3] torch"
	@$(PIP) -c $(PINS) torch
	@echo "[3/3] normuon and what its lab needs"
	@$(PIP) -c $(PINS) -e '.[lab]'
	@touch $(LAB)

# timm in a folder of its own: PyPI's torchvision is built for CUDA's torch, and beside torch's CPU
# wheel it would break the import of transformers, which loads torchvision wherever it finds it.
$(STAMP): $(LAB)
	@echo "[1/2] what the tests, the integrations and the documentation need"
	@$(PIP) -c $(PINS) -e '.[lab,dev,integrations,docs]'
	@echo "[2/2] timm and torchvision"
	@$(PIP) -c $(PINS) --no-deps --target $(VENV)/vision timm torchvision $(WITHOUT_VISION)
	@touch $(STAMP)

install: $(STAMP)

# So that the command can say how to go on: make compare ARGS=--resume.
compare: export NORMUON_MAKE_TARGET = compare
compare: $(LAB)
	$(BIN)/normuon compare $(ARGS)

# Everything about one GPU in ten minutes, with the Python that has torch for CUDA; installs nothing.
gpu:
	PYTHONPATH=src $(PYTHON) -m normuon_lab.bench.suite $(ARGS)

# Six published runs again, on two seeds: about five minutes on two cores.
reproduce-quick: $(LAB)
	$(BIN)/normuon evidence reproduce $(ARGS)

# Every table and figure of docs/results.md, from the files under results/.
results: $(LAB)
	$(BIN)/normuon evidence build $(ARGS)

test: lint types
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint types
	$(PYTEST) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs
	@echo "The site is in build/docs: open build/docs/index.html in a browser, no server needed,"
	@echo "or serve it while you write: $(BIN)/mkdocs serve"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-torch-* .pytest_cache .mypy_cache .ruff_cache dist build
