# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set everything up by themselves; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEGACY := .venv-legacy
NATIVE := CMakeLists.txt setup.py $(shell find csrc -type f)

.PHONY: demo test test-legacy build emulation lint cuda-check install-check bench clean

demo: build
	$(BIN)/pkt demo

test: build emulation
	$(BIN)/python -m pytest
	$(BIN)/python tests/emulation/sanitized.py

# pkt_ext.compat, and what it calls for a model in memory, as the published scripts' own pins have
# it. Nothing of ours is installed there: the module in the tree is free of torch and serves any
# environment of the same Python.
test-legacy: build $(LEGACY)/installed
	PYTHONPATH=$(CURDIR) $(LEGACY)/bin/python -m pytest tests/compat \
	  tests/attribution/test_sensitivity.py tests/attribution/test_neurons.py \
	  tests/models/test_residual_flow.py tests/models/test_versions.py

$(LEGACY)/installed: constraints-legacy.txt | $(VENV)/installed
	test -x $(LEGACY)/bin/python || $(BIN)/python -m venv $(LEGACY)
	$(LEGACY)/bin/python -m pip install --quiet -c constraints-legacy.txt torch
	$(LEGACY)/bin/python -m pip install --quiet -c constraints-legacy.txt \
	  transformers datasets peft accelerate fire matplotlib scipy \
	  sentencepiece protobuf typer pytest
	touch $@

build: $(VENV)/built

# Torch first and by itself: a pinned torch is never traded for a newer one with other wheels.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools cmake ninja pybind11
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# The install above has built the module already; later changes compile only what they touch.
$(VENV)/built: $(VENV)/installed $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

emulation: $(VENV)/installed
	$(BIN)/python tests/emulation/build.py
	$(BIN)/python tests/emulation/build.py --sanitize

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# Every .cu file for every architecture: nvcc's registers and spills against the record, and the
# machine code against the instructions meant. The disassembler, 6 MB, only where there is nvcc.
cuda-check: $(VENV)/installed
	if $(BIN)/python -c 'import setup; exit(not setup.find_nvcc())'; then \
	  $(MAKE) --no-print-directory $(VENV)/disassembler; fi
	$(BIN)/python .ci/registers.py

$(VENV)/disassembler: constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

# A wheel under build isolation, with no torch anywhere near, and the symbols it needs.
install-check: $(VENV)/installed
	$(BIN)/python .ci/install.py

bench: build
	$(BIN)/pkt bench

clean:
	rm -rf build $(VENV) $(LEGACY) pkt_ext/*.so *.egg-info
