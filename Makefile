# make bench   times the layers on this machine and draws the charts
# make test    runs the tests
# make test-oldest   runs the tests on the oldest torch and Triton that are served (a CUDA build of torch: 3 GB)
# make test-gpu    on a machine with a GPU: what only a GPU shows, and the kernel tests compiled
# make sanitize    the same kernels under NVIDIA's compute-sanitizer
# make lint    ruff and mypy
# Each sets up what it needs in a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 75
OLDEST ?= .venv-oldest
OLDEST_TORCH = 2.11.0
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

GPU_TESTS = tests/test_gpu.py tests/test_triton_kernels.py tests/test_triton_layers.py tests/test_replay.py \
	tests/test_fused_backward.py tests/test_transpose.py tests/test_direct_launch.py tests/test_divider.py \
	tests/test_skipped_taps.py

.PHONY: bench test test-oldest test-gpu sanitize lint clean

bench: $(VENV)/.bench-ready
	$(VENV)/bin/tritonconv bench --suite all --seconds $(BUDGET) --output results
	$(VENV)/bin/tritonconv plot --output results
	$(VENV)/bin/tritonconv report results

test: $(VENV)/.test-ready
	$(VENV)/bin/python -m pytest

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest

test-gpu: $(VENV)/.test-ready
	$(VENV)/bin/python -m pytest $(GPU_TESTS)

# Every allocation of its own, so that an access beyond it is seen.
sanitize: $(VENV)/.test-ready
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(VENV)/bin/python -m pytest tests/test_triton_kernels.py -k "exact or strides"

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

$(VENV)/.test-ready: $(VENV)/.bench-ready
	$(PIP) -e '.[test,models]'
	touch $@

# torch 2.11.0 asks for Triton 3.6.0, whose interpreter fails on loops with run-time bounds with numpy 2.4 and later.
$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -e ^numpy -e ^torch= -e ^setuptools constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		'torch==$(OLDEST_TORCH)' 'numpy<2.4' -e '.[test,models]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
