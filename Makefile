# make demo       corpus → shards → trained model → artifact → val_bpb, from nothing but Python ≥ 3.10
# make test       the CPU test suite (GPU tests are reported as skipped)
# make test-gpu   the tests that need a CUDA GPU
# make test-faults  kills, full disks, damaged files by the hundred; a part of them with FAULTS='-k evaluate'
# make records    the tables under records/, from the kept files of runs
# make lint       ruff
# Everything installs into .venv; PYTHON chooses the interpreter that makes it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HAVE_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
TORCH := $(shell grep '^torch==' requirements.txt)
# Runs parts/kernels.py without a GPU, in tests. With one, torch brings the Triton it was built with.
INTERPRETER := 'triton==3.8.0; sys_platform == "linux"'
GPUS := $(if $(HAVE_GPU),$(shell nvidia-smi -L | wc -l),0)

# Idle OpenMP threads sleep instead of spinning: on a machine whose cores are shared, spinning costs a small model a factor of four.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-gpu test-faults records lint clean install

install: $(VENV)/.installed
demo test test-gpu test-faults records lint: $(VENV)/.installed

# Without a GPU torch comes first, as its CPU build: from the configured index if that has one, else from PyTorch's own.
$(VENV)/.installed: requirements.txt requirements-lab.txt requirements-dev.txt requirements-cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(HAVE_GPU),)
	$(BIN)/python -m pip install --quiet '$(TORCH)+cpu' || \
	  $(BIN)/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu '$(TORCH)'
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt $(INTERPRETER)
else
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -r requirements-cuda.txt
endif
	@touch $@

# Each step is skipped when what it makes is there; `make clean` starts over. A killed training run is resumed.
demo:
	@$(BIN)/python demo.py

# One thread a worker: numpy's would be two in each, which wait for each other where cores are shared.
test:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-gpu:
	$(BIN)/python -m pytest -m gpu -s

test-faults:
	$(BIN)/python -m pytest -m faults -p no:cacheprovider tests/test_faults.py tests/test_nodes.py $(FAULTS)

records:
	@$(BIN)/python lab.py records

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs/demo data/datasets/stdlib_sp1024 data/tokenizers/stdlib_sp1024.model
