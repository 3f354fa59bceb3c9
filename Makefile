PYTHON ?= python3
BIN := .venv/bin

.PHONY: pretrain test test-slow lint clean

# A finished install leaves a stamp, so that an interrupted one is repeated.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.installed

pretrain: .venv/.installed
	$(BIN)/python -m experiments.pretrain --config=configs/smollm_r128.py:tiny

test: .venv/.installed-dev
	$(BIN)/python -m pytest

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m experiments.studies.tables --check

clean:
	rm -rf .venv build *.egg-info
