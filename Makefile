# Everything a newcomer needs is `make run` and `make test`; both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CLIENTS := .venv-clients/installed
FUZZER := .venv-fuzz/installed
DEPLOY := .venv-deploy/installed
SUPPLY := .venv-supply/installed
CARD := .venv-card/installed

.PHONY: run test test-all test-clients test-card image-test fuzz audit sbom lint format bench bench-gpu \
	bench-overload bench-memory soak lock clean
.DEFAULT_GOAL := run

run: $(INSTALLED)
	$(BIN)/embedding-server serve --demo

test: $(INSTALLED)
	$(BIN)/pytest

# Adds what needs Debian's chromium, chromium-driver, prometheus and nginx-light, the real clients, and
# requests made up from our OpenAPI document. Kubernetes' schemas and a linter of Dockerfiles have an
# environment of their own, and so has onnxruntime-gpu, which gcc makes a card for that computes nothing.
test-all: $(INSTALLED) $(FUZZER) $(DEPLOY) $(SUPPLY) $(CARD) test-clients
	$(BIN)/pytest -m "not gpu and not image"
	$(BIN)/python -m tests.fuzz --examples 100

# The server on such a card; `pytest -m gpu` is for real ones, where onnxruntime-gpu is installed.
test-card: $(INSTALLED) $(CARD)
	$(BIN)/pytest -m full tests/card

# Needs root and the Debian packages buildah and mmdebstrap.
image-test: $(INSTALLED)
	$(BIN)/pytest -m image

# Decoders, led by what they reach, and requests made up from our OpenAPI document; see tests/fuzz.
fuzz: $(INSTALLED) $(FUZZER)
	$(BIN)/python -m tests.fuzz.guided --seconds 30
	$(BIN)/python -m tests.fuzz --examples 500

# All that the locks pin against known vulnerabilities; says so where nobody can be asked.
audit: $(INSTALLED) $(SUPPLY)
	$(BIN)/python -m tests.supply audit

# Bills of materials of both images, in dist/.
sbom: $(INSTALLED) $(SUPPLY)
	$(BIN)/python -m tests.supply sbom

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

# 20 minutes, or `make soak MINUTES=5`.
soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak $(MINUTES)

$(INSTALLED): requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-dev.lock
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

$(DEPLOY): tests/deploy/requirements.lock
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	touch $@

$(SUPPLY): tests/supply/requirements.lock
	$(PYTHON) -m venv .venv-supply
	.venv-supply/bin/python -m pip install --quiet --no-deps --require-hashes -r $<
	touch $@

$(CARD): tests/card/requirements.lock | $(INSTALLED)
	rm -rf .venv-card
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --target .venv-card -r $<
	rm -r .venv-card/nvidia/*/lib  # ours take its place
	touch $@

# Needs uv. No index address goes into a lock.
COMPILE = uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header
lock:
	$(COMPILE) pyproject.toml --extra cpu --extra dev --extra demo --extra bench \
		-o requirements-dev.lock
	$(COMPILE) pyproject.toml --extra cpu -c requirements-dev.lock -o requirements-cpu.lock
	$(COMPILE) pyproject.toml --extra cuda -o requirements-cuda.lock
	echo hatchling | $(COMPILE) --no-config - -c requirements-dev.lock -o requirements-build.lock
	$(COMPILE) --no-config tests/clients/requirements.in -o tests/clients/requirements.lock
	$(COMPILE) --no-config tests/fuzz/requirements.in -o tests/fuzz/requirements.lock
	$(COMPILE) --no-config tests/deploy/requirements.in -o tests/deploy/requirements.lock
	$(COMPILE) --no-config tests/supply/requirements.in -o tests/supply/requirements.lock
	$(COMPILE) --no-config --no-deps -c requirements-cuda.lock tests/card/requirements.in \
		-o tests/card/requirements.lock

clean:
	rm -rf .venv .venv-clients .venv-fuzz .venv-deploy .venv-supply .venv-card .fuzz
