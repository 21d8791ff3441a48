# Every target sets up its own virtual environment first, with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out

.PHONY: demo test test-all lint bench clean

demo: .venv/.installed  ## Trains on digits with four wrong labels of ten.
	@mkdir -p $(OUT)
	$(BIN)/python examples/noisy_labels.py --out $(OUT)/noisy_labels.png --json $(OUT)/noisy_labels.json

test: .venv/.installed  ## Runs every law, on each step once, and every doctest.
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

test-all: .venv/.installed  ## Runs every test, on every form of a step.
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: .venv/.installed  ## Checks style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: .venv/.installed  ## Measures the figures of the README, side by side.
	$(BIN)/python -m benchmarks.speed --out $(OUT)

clean:
	rm -rf .venv out

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
