# make bench   times the layers on this machine and draws the charts
# make test    runs the tests
# make lint    ruff and mypy
# Each sets up what it needs in a virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 75
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: bench test lint clean

bench: $(VENV)/.bench-ready
	$(VENV)/bin/tritonconv bench --suite all --seconds $(BUDGET) --output results
	$(VENV)/bin/tritonconv plot --output results

test: $(VENV)/.test-ready
	$(VENV)/bin/python -m pytest

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

clean:
	rm -rf $(VENV) build dist *.egg-info
