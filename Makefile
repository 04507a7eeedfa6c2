# make demo | test | lint | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --editable

.PHONY: demo test lint style typecheck clean

demo: $(VENV)/.demo
	$(BIN)/graphswap demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

lint: style typecheck

style: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Pyright reads no package_dir, so links show it the package as it is when installed; and the stubs for
# TensorFlow that it brings are partial, so it is told that anything may be there.
typecheck: $(VENV)/.dev
	@rm -rf build/typings && mkdir -p build/typings/graphswap build/typings/tensorflow
	@ln -s $(addprefix $(CURDIR)/,$(wildcard graphswap/*.py) graphdef rewrites strategies tools) build/typings/graphswap
	@echo 'def __getattr__(name: str): ...' >build/typings/tensorflow/__init__.pyi
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml setup.py | $(BIN)/python
	@echo "Installing graphswap with TensorFlow for CPUs (about 1 GB; minutes the first time)"
	@$(INSTALL) ".[cpu,demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py | $(BIN)/python
	@echo "Installing graphswap with TensorFlow for CPUs and the test tools (about 1.5 GB; minutes the first time)"
	@$(INSTALL) ".[cpu,demo,dev]"
	@touch $@ $(VENV)/.demo
