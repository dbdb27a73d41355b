# Every target sets itself up in .venv; PYTHON names the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:            ## what there is to make
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*##/ -/'

setup: .venv/ready  ## a virtual environment with pinned versions

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	rm -rf *.egg-info    # one that is older than the entry points would hide them
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: setup      ## compile an example on a recorded trace, run it, show the result
	$(BIN)/moecc doctor
	$(BIN)/moecc trace stats examples/tiny-moe/traces/code.npz examples/tiny-moe/traces/prose.npz
	$(BIN)/moecc compile examples/tiny-moe.yaml -o out/tiny-moe
	$(BIN)/moecc run out/tiny-moe --tokens 16 --check

test: setup      ## all tests but the slow ones
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

lint: setup      ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup     ## benchmarks; nothing is asserted
	$(BIN)/python -m pytest -q benchmarks --benchmark-only

clean:           ## remove what make made
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
