# `make demo` and `make test` set up everything they need in .venv; PYTHON picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= sparsemae-demo
JOBS ?= 2

.PHONY: demo test test-interop lint clean
demo: .venv/installed
	$(BIN)/sparsemae demo -o $(OUT) --overwrite

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n $(JOBS) --dist loadscope $(PYTEST_ARGS)

# With the real nnU-Net, 76 packages, in an environment of its own; minutes.
test-interop: .venv-interop/installed
	.venv-interop/bin/pytest tests/interop tests/segmentation/test_samples.py $(PYTEST_ARGS)

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

.venv-interop/installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt \
	    -e '.[test,augmentation]' nnunetv2==2.8.1
	touch $@

clean:
	rm -rf .venv .venv-interop build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(OUT)
