# Two commands for a newcomer: `make quickstart` and `make test`. Each sets up what it needs from the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STEPS ?= 90
# On a machine without a GPU, torch's CPU build saves gigabytes: TORCH_OPTIONS="--index-url URL_OF_TORCH_CPU_INDEX".
TORCH_OPTIONS ?=
# megatron-core asks for Python 3.12 from 0.17 on, but runs on 3.11; what it needs is there already.
MEGATRON := -m pip install --quiet --no-deps --ignore-requires-python --only-binary :all:
# Beside the newest, which is in the environment. Where an older one has no wheel for this Python, its tests are left out.
MEGATRON_VERSIONS := 0.12.3 0.14.0 0.16.1 0.17.1 0.18.0

# Beside the newest, which is in the environment, and torchtitan's: the oldest with pipelines, and where these have changed.
TORCH_VERSIONS := 2.4.1 2.6.0 2.9.1 2.10.0

# Tests run by so many processes side by side: emulated time is mostly sleep. What only `make test-all` runs is held
# against figures as run more closely, for which ranks need cores.
WORKERS ?= 3
REST_WORKERS ?= 2
# Dozens of processes start from the same sources: these are compiled once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
# What fails beside others runs once more alone.
AGAIN := python -m tests.again --dist loadgroup --numprocesses
PYTEST := $(BIN)/$(AGAIN)
UNIT := -m "not e2e and not repeated" --ignore=tests/e2e
# Files with a test of a mark: every process that runs tests would have to read all the others for nothing.
marked = $$(grep --recursive --files-with-matches --extended-regexp 'mark\.$(1)' --include='test_*.py' tests)

# A simulator of data centres and the grid, which drives a job in a test of `make test-all`, with what it needs there.
OPENG2G := openg2g==0.2.0.post1 opendssdirect.py==0.9.4 dss_python==0.15.7 dss_python_backend==0.14.5 \
    cffi==2.0.0 pycparser==2.23

.PHONY: quickstart readme-figures test test-all test-minima release-check lint types docs unit e2e rest megatron titan old-torch setup clean

quickstart: setup
	DS_ACCELERATOR=cpu $(BIN)/torchrun --standalone --nproc-per-node 4 examples/deepspeed_gpt/train.py \
	    --deepspeed_config examples/deepspeed_gpt/quickstart.json --steps $(STEPS)
	@echo
	@echo "All that the job has left is in out/quickstart. What it did, and what it would do with a tenth more time:"
	@echo "    $(BIN)/perseus report out/quickstart"
	@echo "    $(BIN)/perseus plan out/quickstart --slowdown 10%"

# The README's table and pictures are of one run. Leave the machine alone meanwhile.
readme-figures: quickstart
	$(BIN)/python benchmarks/readme_figures.py out/quickstart

# Every promise (tests/README.md), with the newest Megatron in jobs.
test: lint types docs unit e2e

# Every version of Megatron in jobs of its own, and every job of a kind, too.
test-all: test rest

# Unit tests with the lowest releases that setup.cfg asks for, of install and extras; what `setup` installs are the newest.
test-minima: megatron .minima/.installed
	.minima/bin/$(AGAIN) $(WORKERS) $(UNIT)

# NumPy 1.24 has wheels up to Python 3.11, and lacks what Megatron's core imports from 0.14 on.
.minima/.installed: setup.cfg requirements-torch.txt requirements-dev.txt
	$(PYTHON) -m venv .minima
	sed -n '/^install_requires/,/^deepspeed/s/^ *\([A-Za-z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg > .minima/minima.txt
	.minima/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	.minima/bin/python -m pip install --quiet $(TORCH_OPTIONS) -c .minima/minima.txt -r requirements-torch.txt
	DS_BUILD_OPS=0 .minima/bin/python -m pip install --quiet --no-build-isolation -c .minima/minima.txt -r requirements-dev.txt
	touch $@

# What would be released: built, checked, and installed into a fresh environment of each Python from 3.10 to 3.13 that is here.
release-check:
	.ci/release-check $(PYTHON)

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml requirements-torch.txt requirements-dev.txt requirements-megatron.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) -r requirements-torch.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -r requirements-dev.txt
	$(BIN)/python $(MEGATRON) -r requirements-megatron.txt || \
	    echo "megatron-core was not installed (no wheel for this Python?): its tests are left out"
	touch $@

megatron: .megatron/.installed .resiliency/.installed

# Beside the environment: Megatron asks it for things that this version does not have.
.resiliency/.installed: Makefile $(VENV)/.installed
	$(BIN)/python $(MEGATRON) --upgrade --target .resiliency nvidia-resiliency-ext==0.4.1 || \
	    echo "nvidia-resiliency-ext was not installed (no wheel for this Python?): its tests are left out"
	mkdir -p .resiliency && touch $@

.megatron/.installed: Makefile $(VENV)/.installed
	mkdir -p .megatron
	for version in $(MEGATRON_VERSIONS); do \
	    test -d .megatron/$$version || $(BIN)/python $(MEGATRON) --target .megatron/$$version megatron-core==$$version || \
	    echo "megatron-core $$version was not installed (no wheel for this Python?): its tests are left out"; \
	done
	touch $@

# torchtitan's own trainer, in an environment of its own, since it needs a newer torch (gigabytes, unless TORCH_OPTIONS
# names an index of CPU builds). Where it is there, `make test-all` runs its test too.
titan: setup .titan/.installed
	$(BIN)/pytest tests/e2e/test_torchtitan.py

.titan/.installed: Makefile setup.cfg
	$(PYTHON) -m venv .titan
	.titan/bin/python -m pip install --quiet $(TORCH_OPTIONS) torch==2.14.1
	.titan/bin/python -m pip install --quiet torchtitan==0.3.0 setuptools wheel
	.titan/bin/python -m pip install --quiet --no-build-isolation --editable '.[all]'
	touch $@

# PyTorch's own pipelines with older versions of torch; gigabytes each, as above.
old-torch: setup .old_torch/.installed
	$(BIN)/pytest tests/e2e/test_old_torch.py

.old_torch/.installed: Makefile setup.cfg
	for version in $(TORCH_VERSIONS); do \
	    $(PYTHON) -m venv .old_torch/$$version && \
	    .old_torch/$$version/bin/python -m pip install --quiet $(TORCH_OPTIONS) torch==$$version && \
	    .old_torch/$$version/bin/python -m pip install --quiet numpy setuptools wheel && \
	    .old_torch/$$version/bin/python -m pip install --quiet --no-build-isolation --editable '.[all]' || exit 1; \
	done
	touch $@

.openg2g/.installed: Makefile $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --upgrade --target .openg2g $(OPENG2G) || \
	    echo "OpenG2G was not installed (no wheel for this Python?): its test is left out"
	mkdir -p .openg2g && touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Any warning (a dead link, a page without a place, an unknown name) ends it; --quiet would hide them from --strict too.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

unit: setup megatron
	$(PYTEST) $(WORKERS) $(UNIT)

e2e: setup megatron
	$(PYTEST) $(WORKERS) -m "e2e and not matrix and not repeated" $(call marked,e2e)

rest: setup megatron .openg2g/.installed
	$(PYTEST) $(REST_WORKERS) -m "matrix or repeated" $(call marked,(matrix|repeated))
	$(PYTEST) $(WORKERS) --hypothesis-profile many -m many $(call marked,many)

clean:
	rm -rf $(VENV) .megatron .resiliency .titan .old_torch .openg2g .minima out build dist *.egg-info
