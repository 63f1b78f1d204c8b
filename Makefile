# make run: train the small example; make test: lint and the whole test suite. Both install into .venv first.
PYTHON ?= python3
# Processes of make run; one a GPU by default.
RANKS ?=
CONFIG ?= configs/tiny.toml
SANITIZER ?= compute-sanitizer
# Small tests that run every kernel forward and backward.
KERNELS := -n 0 -q tests/test_backend.py -k plain_twins
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run test test-megatron sanitize lint clean

# The GPUs of the machine, a power of two of them, share each sequence; two processes where there is none.
run: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node \
		$(or $(RANKS),$$($(BIN)/python -c 'import torch; n = torch.cuda.device_count(); print(1 << n.bit_length() - 1 if n else 2)')) \
		-m launch.train --config $(CONFIG) --fresh

test: lint
	$(BIN)/python -m pytest

# The launcher against a real checkout: make test-megatron MEGATRON_LM=../Megatron-LM
test-megatron: $(STAMP)
	@test -n '$(MEGATRON_LM)' || { echo 'Say where Megatron-LM is: make test-megatron MEGATRON_LM=...' >&2; exit 1; }
	MEGATRON_LM='$(MEGATRON_LM)' $(BIN)/python -m pytest -n 0 tests/test_megatron_lm.py

# The kernels under NVIDIA's checkers of memory and of races, on a GPU. Races that it finds in cuDNN's kernels are not ours
# to mend, so that only memory errors end the command.
sanitize: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo 'make sanitize needs an NVIDIA GPU' >&2; exit 1; }
	@command -v $(SANITIZER) > /dev/null || \
		{ echo 'make sanitize needs compute-sanitizer, of the CUDA toolkit: make sanitize SANITIZER=...' >&2; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest $(KERNELS)
	$(SANITIZER) --tool racecheck $(BIN)/python -m pytest $(KERNELS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Installed again only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed: make PYTHON=python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo 'Python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[launch,wandb,huggingface,megatron,deepspeed,mpi,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
