# Every target sets up its own virtual environment first, with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out

.PHONY: demo test test-all test-versions locks lint format bench docs docs-check clean

demo: .venv/.installed  ## Trains on digits with 40% wrong labels.
	$(BIN)/python examples/noisy_labels.py --out $(OUT)

test: .venv/.installed  ## Unit tests, laws on each step once, doctests.
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

test-all: .venv/.installed  ## All forms of each step, several processes, robustness.
	$(BIN)/python -m pytest -n auto --dist loadgroup

VERSIONS := lowest-3.11 newest-3.12 newest-3.13 plain-3.12

test-versions: $(VERSIONS:%=test-%)  ## Three Pythons, oldest and newest releases, no extras.

test-%: .venvs/%/.installed
	.venvs/$*/bin/python -m pytest -n auto --dist loadgroup -m "not slow" $(PYTEST)

# Old releases of others warn of what newer ones have mended.
test-lowest-%: PYTEST := -W ignore::DeprecationWarning -W "ignore:Sharding info not provided:UserWarning"

# Doctests of the package use the extras.
test-plain-%: PYTEST := tests

.venvs/%/.installed: .ci/*.lock pyproject.toml
	python$(lastword $(subst -, ,$*)) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install --quiet --disable-pip-version-check -r .ci/$(firstword $(subst -, ,$*)).lock
	.venvs/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

LOCK := uv pip compile --quiet --universal --no-annotate --group build pyproject.toml

locks:  ## Writes the locks of test-versions anew.
	$(LOCK) --python-version 3.11 --resolution lowest-direct --extra test --output-file .ci/lowest.lock
	$(LOCK) --python-version 3.12 --upgrade --extra test --output-file .ci/newest.lock
	$(LOCK) --python-version 3.12 --upgrade --group plain --output-file .ci/plain.lock

lint: .venv/.installed  ## Checks style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: .venv/.installed  ## Formats the code, and mends what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## Measures the figures of the README, side by side.
	$(BIN)/python -m benchmarks.speed --out $(OUT)

docs: .venv/.docs  ## Makes the site; a warning is an error.
	rm -rf docs/api/generated $(OUT)/site
	$(BIN)/sphinx-build -q -W --keep-going docs $(OUT)/site
	@echo "$(OUT)/site/index.html"

docs-check: docs  ## Opens every page in Chromium (Debian's).
	$(BIN)/python docs/check.py $(OUT)/site --out $(OUT)/screenshots

.venv/.docs: .venv/.installed .ci/docs.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .ci/docs.lock
	@touch $@

clean:
	rm -rf .venv .venvs out

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
