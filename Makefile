# Everything a newcomer needs is `make run` and `make test`; both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
FUZZER := .venv-fuzz/installed

.PHONY: run test test-all fuzz lint format bench bench-overload bench-memory lock clean
.DEFAULT_GOAL := run

run: $(INSTALLED)
	$(BIN)/embedding-server serve --demo

test: $(INSTALLED)
	$(BIN)/pytest

# Adds what needs a browser: the Debian packages chromium and chromium-driver.
test-all: $(INSTALLED) $(FUZZER)
	$(BIN)/pytest -m "not gpu"
	$(BIN)/python -m tests.fuzz --examples 100

# Requests made up from our OpenAPI document; see tests/fuzz.
fuzz: $(INSTALLED) $(FUZZER)
	$(BIN)/python -m tests.fuzz --examples 500

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

bench-overload: $(INSTALLED)
	$(BIN)/python -m benchmarks.overload

bench-memory: $(INSTALLED)
	$(BIN)/python -m benchmarks.memory

$(INSTALLED): requirements-cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(FUZZER): tests/fuzz/requirements.lock
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	touch $@

# Needs uv. No index address goes into a lock.
COMPILE = uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header
lock:
	$(COMPILE) pyproject.toml --extra cpu --extra dev --extra demo --extra bench -o requirements-cpu.lock
	$(COMPILE) pyproject.toml --extra cuda -o requirements-cuda.lock
	$(COMPILE) tests/fuzz/requirements.in -o tests/fuzz/requirements.lock

clean:
	rm -rf .venv .venv-fuzz
