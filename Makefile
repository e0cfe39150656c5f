# make bench   sets up a virtual environment, times the layers on this machine, draws the charts
# make test    sets it up too, runs the tests
# make lint    ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
BUDGET ?= 100

.PHONY: bench test lint clean

bench: $(VENV)/.ready
	$(BIN)/tritonconv bench --suite all --seconds $(BUDGET) --output results
	$(BIN)/tritonconv plot --output results

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and pinned, so that no other package pulls in another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,models]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
