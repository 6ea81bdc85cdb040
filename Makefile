# Everything a newcomer needs is `make run` and `make test`; both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CLIENTS := .venv-clients/installed
DEPLOY := .venv-deploy/installed

.PHONY: run test test-all test-clients image-test lint format bench bench-overload bench-memory lock clean
.DEFAULT_GOAL := run

run: $(INSTALLED)
	$(BIN)/embedding-server serve --demo

test: $(INSTALLED)
	$(BIN)/pytest

# Adds what needs the Debian packages chromium, chromium-driver and nginx-light, and the real clients.
# Kubernetes' schemas and a linter of Dockerfiles have an environment of their own.
test-all: $(INSTALLED) $(DEPLOY) test-clients
	$(BIN)/pytest -m "not gpu and not image"

# Needs root and the Debian packages buildah and mmdebstrap.
image-test: $(INSTALLED)
	$(BIN)/pytest -m image

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

$(DEPLOY): tests/deploy/requirements.lock
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	touch $@

# Needs uv. No index address goes into a lock.
COMPILE = uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header
lock:
	$(COMPILE) pyproject.toml --extra cpu --extra dev --extra demo --extra bench \
		-o requirements-cpu.lock
	$(COMPILE) pyproject.toml --extra cuda -o requirements-cuda.lock
	$(COMPILE) --no-config tests/clients/requirements.in -o tests/clients/requirements.lock
	$(COMPILE) --no-config tests/deploy/requirements.in -o tests/deploy/requirements.lock

clean:
	rm -rf .venv .venv-clients .venv-deploy
