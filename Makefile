# Everything a newcomer needs is `make run` and `make test`; both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: run test test-all lint format bench bench-gpu bench-overload bench-memory lock clean
.DEFAULT_GOAL := run

run: $(INSTALLED)
	$(BIN)/embedding-server serve --demo

test: $(INSTALLED)
	$(BIN)/pytest

# Adds what needs a browser: the Debian packages chromium and chromium-driver.
test-all: $(INSTALLED)
	$(BIN)/pytest -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# On a machine with a card, in an environment with onnxruntime-gpu; torch is compared if it is there.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu

bench-overload: $(INSTALLED)
	$(BIN)/python -m benchmarks.overload

bench-memory: $(INSTALLED)
	$(BIN)/python -m benchmarks.memory

$(INSTALLED): requirements-cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Needs uv. No index address goes into a lock.
COMPILE = uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header
lock:
	$(COMPILE) --extra cpu --extra dev --extra demo --extra bench -o requirements-cpu.lock
	$(COMPILE) --extra cuda -o requirements-cuda.lock

clean:
	rm -rf .venv
