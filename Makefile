# make demo    train on real images where BatchNorm falls behind, print the table, save the plot
# make test    every test that this machine can run, CUDA kernels included (under an emulator)
# make lint    ruff, mypy and clang-format
# make asan    the emulator's tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make build   the extension alone, in place
# make clean   removes what was built and .venv
#
# PYTHON=python3.12   the interpreter that .venv is made with, 3.10 or newer
# TORCH=torch==2.15.0   another torch, with options of pip if need be
# DEMO_ARGS=--quick   options of examples/digits.py       PYTEST_ARGS='-k modules'   options of pytest
# BATCHRENORM_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX   as setup.py says

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=

# A .venv made for another PYTHON or TORCH is made anew.
KEY := $(shell echo '$(PYTHON) $(TORCH)' | cksum | cut -d' ' -f1)
VENV := .venv/made-$(KEY)
READY := .venv/ready-$(KEY)
RUN := .venv/bin/python
PIP := $(RUN) -m pip install -q --disable-pip-version-check
CXX_FILES := $(wildcard bench/*.cpp bench/*.cu bench/*.cuh csrc/*/*.h csrc/*/*.cuh csrc/*/*.cu csrc/*/*.cpp tests/simt/*.h tests/simt/*.cpp tests/simt/*.cu tests/simt/include/*)

# pyproject.toml's optional dependencies, all of them. setuptools brings a parser to Python 3.10, which has none.
define EXTRAS
from setuptools.config.pyprojecttoml import load_file
extras = load_file("pyproject.toml")["project"]["optional-dependencies"]
print(*sum(extras.values(), []))
endef
export EXTRAS

# A process a core. Each takes the next tests in a row, so that what a file prepares is prepared once or twice.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test lint asan build clean

demo: build
	$(RUN) examples/digits.py $(DEMO_ARGS)

test: build
	$(RUN) -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

asan: build
	$(RUN) tests/simt/sanitize.py $(SIDE_BY_SIDE) tests/test_emulator*.py -q

# The editable install comes second: it finds everything built, and lets `batchrenorm_cuda` be imported from anywhere.
# How it does so, and as which version, is for pyproject.toml to say.
build: $(READY)
	$(RUN) setup.py -q build_ext --inplace
	@test .venv/editable -nt pyproject.toml || $(PIP) --no-deps --no-build-isolation -e .
	@touch .venv/editable

$(VENV):
	$(PYTHON) -c 'import sys; sys.exit("error: needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH) 'setuptools>=77' ninja==1.13.0
	touch $@

$(READY): $(VENV) pyproject.toml
	$(PIP) $$($(RUN) -c "$$EXTRAS")
	touch $@

clean:
	rm -rf .venv build dist *.egg-info batchrenorm_cuda/*.so .pytest_cache .ruff_cache .hypothesis
