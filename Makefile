# Three commands for everybody: make demo, make test, make check. Each sets up what it needs in .venv.

# python3 if it is a version that prelay supports, else the first such one by name.
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
TYPED := engine transfer prefill_worker decode_worker router cluster bench hatch_build.py

.PHONY: help demo test test-slow check protos clean

help:
	@echo "make demo       answer 24 prompts on one prefill and one decode worker, and check every answer"
	@echo "make test       run the tests (a few minutes on two cores)"
	@echo "make test-slow  run the long tests: whole clusters, kill -9, training data"
	@echo "make check      lint, format, types, generated stubs, layout of the house"
	@echo "make protos     generate the Python stubs from proto/"
	@echo "make clean      remove .venv and caches"

demo: .venv/core
	$(BIN)/prelay demo

test: .venv/dev
	$(BIN)/pytest --numprocesses=2 --dist=worksteal

test-slow: .venv/dev
	$(BIN)/pytest -m slow

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(TYPED)
	$(BIN)/python proto/generate.py --check
	$(BIN)/pytest tests/test_layout.py

protos: .venv/dev
	$(BIN)/python proto/generate.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What serving needs.
.venv/core: pyproject.toml constraints.txt hatch_build.py $(wildcard engine/native/*.h engine/native/*.cpp)
	@test -n "$(PYTHON)" || { echo "prelay needs Python 3.11 or 3.12; install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# What developing needs, on top.
.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
