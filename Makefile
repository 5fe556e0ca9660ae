# One virtual environment, from a full lock file. `make quickstart` needs nothing but Python 3.11 and a C++ compiler.

SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
TEST_STAMP := $(VENV)/.installed-test
BASE_PYTHON := $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# Where the package index has only the CUDA build of torch, the CPU build is found here; an unreachable host is skipped.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(PYTHON) -m pip --disable-pip-version-check install -qq --no-deps

.PHONY: install quickstart test test-all faults chaos lint format bench bench-ledger bench-scaling lock-gpu clean

install: $(STAMP)

$(STAMP): requirements/cpu.txt pyproject.toml
	@test -n "$(BASE_PYTHON)" || { echo "make install: Python 3.11 was not found: install it (python3.11 with venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "make install: g++ was not found: DeepSpeed compiles a small operation with it"; exit 1; }
	@set -e; start=$$SECONDS; \
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV); \
	echo "install: torch (CPU build; an extra index that cannot be reached is skipped)"; \
	$(PIP) --retries 1 --timeout 20 --extra-index-url $(TORCH_INDEX) $$(grep '^torch==' requirements/cpu.txt); \
	torch=$$((SECONDS - start)); \
	echo "install: $$(grep -c == requirements/cpu.txt) locked packages"; \
	$(PIP) -r requirements/cpu.txt; \
	locked=$$((SECONDS - start - torch)); \
	$(PIP) -e .; \
	touch $@; \
	echo "install: $$((SECONDS - start)) s (torch $$torch s, other packages $$locked s, dprlhf_ray $$((SECONDS - start - torch - locked)) s)"

quickstart: install
	$(VENV)/bin/dprlhf run configs/quickstart.yaml --output runs/quickstart

# What only tests need: parsers and schemas of the formats in cluster/.
$(TEST_STAMP): requirements/test.txt $(STAMP)
	@echo "install: packages of the tests"
	@$(PIP) -r requirements/test.txt
	@touch $@

test: install $(TEST_STAMP)
	$(PYTHON) -m pytest -q -m "not slow"

test-all: install $(TEST_STAMP)
	$(PYTHON) -m pytest -q

faults: install $(TEST_STAMP)
	$(PYTHON) -m tests.broken.run

chaos: install $(TEST_STAMP)
	$(PYTHON) -m pytest -q --durations=0 tests/chaos

lint: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy dprlhf_ray

format: install
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

$(BENCH_STAMP): requirements/bench.txt $(STAMP)
	@$(PIP) -r requirements/bench.txt
	@touch $@

bench: $(BENCH_STAMP)
	$(PYTHON) -m benchmarks.run

bench-ledger: install
	$(PYTHON) -m benchmarks.ledger

bench-scaling: install
	$(PYTHON) -m benchmarks.scaling
	$(PYTHON) -m benchmarks.crowd

# Resolves the top-level pins for Linux GPU machines (needs `pip install uv`); its comments become the lock's.
lock-gpu:
	{ grep '^#' requirements/gpu.in; uv pip compile --quiet --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --no-header --no-annotate --no-emit-index-url \
		--index-strategy unsafe-best-match requirements/gpu.in; } > requirements/gpu.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
