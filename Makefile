# `make demo` and `make test` set up everything they need in .venv; PYTHON picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= sparsemae-demo

.PHONY: demo test lint clean
demo: .venv/installed
	$(BIN)/sparsemae demo -o $(OUT) --overwrite

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamps let a second call run without the network.
.venv/installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install -q -c constraints.txt -e '.[test]'
	$(PIP) install -q --no-deps -c constraints.txt dynamic-network-architectures
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(OUT)
