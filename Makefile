# Everything a newcomer needs is `make run` and `make test`; both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CLIENTS := .venv-clients/installed
FUZZER := .venv-fuzz/installed

.PHONY: run test test-all test-clients fuzz lint format bench bench-gpu bench-overload \
	bench-memory lock clean
.DEFAULT_GOAL := run

run: $(INSTALLED)
	$(BIN)/embedding-server serve --demo

test: $(INSTALLED)
	$(BIN)/pytest

# Adds what needs Debian's chromium, chromium-driver and prometheus, the real clients, and requests
# made up from our OpenAPI document.
test-all: $(INSTALLED) $(FUZZER) test-clients
	$(BIN)/pytest -m "not gpu"
	$(BIN)/python -m tests.fuzz --examples 100

# Requests made up from our OpenAPI document; see tests/fuzz.
fuzz: $(INSTALLED) $(FUZZER)
	$(BIN)/python -m tests.fuzz --examples 500

# The clients people have against a real server, in an environment of their own.
test-clients: $(INSTALLED) $(CLIENTS)
	EMBEDDING_SERVER=$(abspath $(BIN))/embedding-server \
		.venv-clients/bin/pytest -c tests/clients/pytest.ini tests/clients

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

$(CLIENTS): tests/clients/requirements.lock
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	touch $@

$(FUZZER): tests/fuzz/requirements.lock
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	touch $@

# Needs uv. No index address goes into a lock.
COMPILE = uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header
lock:
	$(COMPILE) pyproject.toml --extra cpu --extra dev --extra demo --extra bench \
		-o requirements-cpu.lock
	$(COMPILE) pyproject.toml --extra cuda -o requirements-cuda.lock
	$(COMPILE) --no-config tests/clients/requirements.in -o tests/clients/requirements.lock
	$(COMPILE) --no-config tests/fuzz/requirements.in -o tests/fuzz/requirements.lock

clean:
	rm -rf .venv .venv-clients .venv-fuzz
