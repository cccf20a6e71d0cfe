# A fresh machine needs Python 3.11+ with venv, g++ and make; then
#
#   make demo    compress a real language model to a byte budget and show what it cost
#   make test    install the development tools and run the tests
#   make sanitize  run the CPU kernels under the address, undefined behaviour and thread sanitizers
#   make test-kernels  all tests of the CUDA and Triton kernels: emulated, interpreted, and compiled
#                      for every architecture; `make kernel-tools` installs what that needs
#   make test-gpu  the same kernels on a real GPU (and Triton's as compiled, not interpreted)
#   make cubins  compile the CUDA kernels ahead of time, into build/cubins
#   make peers   install what `quantlib bench` compares with: onnxruntime, OpenVINO, llama.cpp
#
# PIP_ARGS goes to every pip install. PyTorch's default build for Linux may bring several GB of CUDA
# libraries; a CPU-only index makes it small:  make demo PIP_ARGS="--extra-index-url URL"
# DEMO_ARGS and TEST_ARGS go to the demo and to pytest:  make test TEST_ARGS="tests/formats -x"

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=

BIN := .venv/bin
PIP_INSTALL = $(BIN)/python -m pip install --constraint constraints.txt $(PIP_ARGS)

.PHONY: help demo test sanitize kernel-tools test-kernels test-gpu cubins peers install install-dev lint format constraints

help:
	@sed -n 's/^#   //p' Makefile

# -P keeps the repository root off sys.path, where the folder kernels/ would hide a package of that name.
demo: install
	$(BIN)/python -P -m quantlib.bench.demo $(DEMO_ARGS)

# One process per core: tests compute with one thread each. tests/conftest.py orders the files.
test: install-dev
	$(BIN)/python -P -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# Needs a C++ compiler and its sanitizers, no package; not part of `make test`: it takes minutes.
sanitize:
	$(PYTHON) dev/sanitize.py

# No GPU is needed. A CUDA toolkit on PATH or in CUDA_HOME is used before these packages; what cannot
# be had is skipped, and said.
KERNEL_TOOLS := nvidia-cuda-nvcc nvidia-cuda-nvrtc nvidia-cuda-nvdisasm 'triton>=3.6'

kernel-tools: .venv/kernel-tools
.venv/kernel-tools: | install-dev
	$(PIP_INSTALL) $(KERNEL_TOOLS) && touch $@ || echo "some tests of kernels will be skipped" >&2

# Single tests are dealt out, not files: one file has a third of them.
test-kernels: kernel-tools
	$(BIN)/python -P -m pytest --numprocesses logical --dist worksteal --timeout 900 -m "kernels or not kernels" \
		tests/kernels/cuda tests/kernels/triton tests/kernels/test_dispatch.py \
		tests/kernels/test_dispatch_models.py $(TEST_ARGS)

# Triton and CuPy: pip install '.[triton,cuda]'. What is missing is skipped, and said.
test-gpu: install-dev
	TRITON_INTERPRET=0 $(BIN)/python -P -m pytest -m gpu tests/kernels $(TEST_ARGS)

cubins: kernel-tools
	$(BIN)/python -P -m quantlib.kernels.cuda.cubins build/cubins

# Optional, and each peer for itself: one that cannot be had is named, and left out of benchmarks.
peers: install
	$(BIN)/python -P -m quantlib.bench.peers.install --pip-args "$(PIP_ARGS)" \
		--constraint constraints.txt --constraint constraints-peers.txt

lint: install-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python dev/typecheck.py

format: install-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: .venv/installed
install-dev: .venv/installed-dev

# The stamps are files, so a second `make` installs nothing until one of these changes.
.venv/installed: setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

.venv/installed-dev: setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[bench,dev]'
	@touch $@ .venv/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "quantlib needs Python 3.11 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "Could not create .venv; on Debian: apt install python3-venv" >&2; exit 1; }

# After upgrading the packages in .venv and running the tests: pin what was tested. A local version
# such as 2.13.0+cpu names one index's build, so the part after the plus sign is left out.
constraints: install-dev
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip | sed 's/+.*//'; } > constraints.new
	mv constraints.new constraints.txt
