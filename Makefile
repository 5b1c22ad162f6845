# One way to run things; .ci/run calls the same targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv
COMPILE := $(UV) pip compile --quiet --no-header --generate-hashes

# Stamps carry the content of what they were made from, so that a changed lock or a moved folder installs again
# and a touched file does not.
hash = $(shell { cat requirements-uv.lock requirements-build.lock pyproject.toml $(1); echo $(CURDIR); } | cksum | cut -d' ' -f1)
DEV := $(VENV)/.stamp-dev-$(call hash,requirements-dev.lock)
PEERS := $(VENV)-peers/.stamp-$(call hash,requirements-bench.lock)
RUN := $(VENV)/.stamp-run-$(call hash,requirements.lock)

# Tests start many processes, and each run of a workflow loads its modules anew. Where Python is told to keep
# nothing that it compiled, that is half of their time.
test test-large test-real: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup peers demo up doctor check format test test-large test-real lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(DEV) ## own environment with everything for development

peers: $(PEERS) ## the environment of the peers that benchmarks run beside ours

demo: $(RUN) ## propose, approve and publish on this machine
	$(BIN)/countersign demo

up: $(RUN) ## Temporal, models and workers until Ctrl-C
	$(BIN)/countersign up

doctor: $(RUN) ## what is installed, missing, and used instead
	$(BIN)/countersign doctor

check: $(DEV) ## format, lint, types, layout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest tests/test_layout.py

format: $(DEV) ## put the code in shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(DEV) ## tests that need nothing but this environment
	$(BIN)/pytest -m "not real"

test-large: $(DEV) ## the same of much more, where minutes do not matter
	$(BIN)/pytest -m "large and not real" --large

test-real: $(DEV) ## tests against real programs
	bash scripts/targets/hugo.sh
	sh scripts/targets/weaviate.sh install
	$(BIN)/pytest -m real

lock: $(BIN)/.uv ## resolve the versions again
	$(COMPILE) pyproject.toml -o requirements.lock
	$(COMPILE) pyproject.toml --group dev -o requirements-dev.lock
	$(COMPILE) requirements-uv.in -o requirements-uv.lock
	$(COMPILE) requirements-build.in -o requirements-build.lock
	$(COMPILE) requirements-bench.in -o requirements-bench.lock

clean: ## remove the environment; data in var/ stays
	rm -rf $(VENV) $(VENV)-peers *.egg-info .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/.uv: requirements-uv.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	touch $@

$(DEV): | $(BIN)/.uv
	$(call install,requirements-dev.lock)
	rm -f $(VENV)/.stamp-*
	touch $@

# Development tools that are there stay: then the larger lock is installed, which covers the smaller one.
$(RUN): | $(BIN)/.uv
	if compgen -G '$(VENV)/.stamp-dev-*' >/dev/null; then \
	  $(MAKE) --no-print-directory $(DEV); \
	else \
	  $(call install,requirements.lock); \
	fi
	rm -f $(VENV)/.stamp-run-*
	touch $@

$(PEERS): | $(BIN)/.uv
	$(PYTHON) -m venv $(VENV)-peers
	VIRTUAL_ENV=$(CURDIR)/$(VENV)-peers $(BIN)/uv pip sync --quiet --require-hashes requirements-bench.lock
	rm -f $(VENV)-peers/.stamp-*
	touch $@

# What builds our own package is pinned by hash as well; it runs code.
define install
$(UV) pip sync --quiet --require-hashes $(1) && \
  $(UV) pip install --quiet --no-deps --build-constraints requirements-build.lock -e .
endef
