# make bench   times the layers on this machine and draws the charts
# make test    runs the tests, in a process per core
# make test-oldest   runs the tests on the oldest torch and Triton that are served (a CUDA build of torch: 3 GB)
# make test-gpu    on a machine with a GPU: what only a GPU shows; meant to take two minutes on 16 cores, which compile
# make test-gpu-all    the exact tests of all kernels compiled, and the rounding on every class of layers, besides
# make sanitize    each Triton variant on one small shape under NVIDIA's compute-sanitizer
# make lint    ruff and mypy
# Each sets up what it needs in a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 75
OLDEST ?= .venv-oldest
OLDEST_TORCH = 2.11.0
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

# A process per core, but no more than 14: on a GPU each holds a context, and torch, of a gigabyte.
PYTEST = -m pytest -n auto --maxprocesses 14 --dist loadgroup
GPU_TESTS = tests/test_gpu.py tests/test_giants.py tests/test_nonfinite.py tests/test_sanitize.py \
	tests/test_graphed_gpu.py tests/test_replay.py tests/test_transpose.py tests/test_direct_launch.py \
	tests/test_divider.py tests/test_gpu_arrival.py
KERNEL_TESTS = tests/test_triton_kernels.py tests/test_triton_layers.py tests/test_fused_backward.py \
	tests/test_skipped_taps.py tests/test_arrival.py

.PHONY: bench test test-oldest test-gpu test-gpu-all sanitize have-sanitizer lint clean

bench: $(VENV)/.bench-ready
	$(VENV)/bin/tritonconv bench --suite all --seconds $(BUDGET) --output results
	$(VENV)/bin/tritonconv report results

test: $(VENV)/.test-ready
	$(VENV)/bin/python $(PYTEST)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python $(PYTEST)

test-gpu: $(VENV)/.test-ready
	$(VENV)/bin/python $(PYTEST) $(GPU_TESTS)

test-gpu-all: $(VENV)/.test-ready
	EVERY_LAYER=1 $(VENV)/bin/python $(PYTEST) $(GPU_TESTS) $(KERNEL_TESTS)

# First without it, on all cores: what is compiled then is in Triton's cache. Then in one process, every allocation of
# its own, so that an access beyond it is seen.
sanitize: have-sanitizer $(VENV)/.test-ready
	$(VENV)/bin/python $(PYTEST) tests/test_sanitize.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(VENV)/bin/python -m pytest tests/test_sanitize.py

have-sanitizer:
	@command -v compute-sanitizer > /dev/null || { echo "make sanitize needs compute-sanitizer on PATH: it comes with \
	CUDA's toolkit, in its bin or in extras/compute-sanitizer" >&2; exit 1; }

lint: $(VENV)/.test-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch comes first and pinned, so that no other package brings in another build of it.
$(VENV)/.bench-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[bench]'
	touch $@

# nnU-Net's package comes without what it asks for: timm brings a torchvision that a CPU build of torch cannot load.
$(VENV)/.test-ready: $(VENV)/.bench-ready
	$(PIP) -e '.[test]'
	$(PIP) --no-deps dynamic-network-architectures
	touch $@

# torch 2.11.0 asks for Triton 3.6.0, whose interpreter fails on loops with run-time bounds with numpy 2.4 and later.
$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -e ^numpy -e ^torch= -e ^setuptools constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		'torch==$(OLDEST_TORCH)' 'numpy<2.4' -e '.[test]'
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt --no-deps \
		dynamic-network-architectures
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
