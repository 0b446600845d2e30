# Two commands for a newcomer: `make quickstart` and `make test`. Each sets up what it needs from the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STEPS ?= 90
# On a machine without a GPU, torch's CPU build saves gigabytes: TORCH_OPTIONS="--index-url URL_OF_TORCH_CPU_INDEX".
TORCH_OPTIONS ?=

.PHONY: quickstart test lint types docs unit e2e setup clean

quickstart: setup
	DS_ACCELERATOR=cpu $(BIN)/torchrun --standalone --nproc-per-node 4 examples/deepspeed_gpt/train.py \
	    --deepspeed_config examples/deepspeed_gpt/quickstart.json --steps $(STEPS)

test: lint types docs unit e2e

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml requirements-torch.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) -r requirements-torch.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Any warning (a dead link, a page without a place, an unknown name) ends it; --quiet would hide them from --strict too.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

unit: setup
	$(BIN)/pytest -m "not e2e"

e2e: setup
	$(BIN)/pytest -m e2e

clean:
	rm -rf $(VENV) out build dist *.egg-info
