# make demo    train on real images where BatchNorm fails, print the table, save the plot
# make test    every test that this machine can run, CUDA kernels included (under an emulator)
# make lint    ruff and clang-format
# make asan    the emulator's tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make build   the extension alone, in place
# make clean   removes what was built and .venv
#
# PYTHON=python3.12   the interpreter that .venv is made with, 3.10 or newer
# TORCH=torch==2.15.0   another torch; "torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" works too
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
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cu csrc/*/*.cpp tests/simt/*.h tests/simt/*.cpp tests/simt/include/*)

.PHONY: demo test lint asan build clean

demo: build
	$(RUN) examples/digits.py $(DEMO_ARGS)

test: build
	$(RUN) -m pytest tests $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

asan: build
	$(RUN) tests/simt/sanitize.py tests/test_emulator.py -q

build: $(READY)
	$(RUN) setup.py -q build_ext --inplace

$(VENV):
	$(PYTHON) -c 'import sys; sys.exit("error: needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --disable-pip-version-check $(TORCH) 'setuptools>=77' ninja==1.13.0
	touch $@

$(READY): $(VENV) pyproject.toml
	$(RUN) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo,test,lint]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info batchrenorm_cuda/*.so .pytest_cache .ruff_cache .hypothesis
