# Two commands: `make demo` runs the main job, `make test` runs the tests. Each makes its environment first.
PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.made
export HF_HUB_OFFLINE ?= 1

.PHONY: demo quick test slow faults check bench docs env clean

demo: env  ## distil the embedded student by OPD and by TOPD, compare, write runs/demo (under 10 minutes)
	$(BIN)/topd demo

quick: env  ## the same in under 2 minutes
	$(BIN)/topd demo --quick --out runs/quick

test: env  ## lint, types, import directions, then every test that is not marked slow
	$(MAKE) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

slow: env  ## the slow proofs: real pretrained model, clean-clone demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

faults: env  ## kills, full disks, interrupts, hostile files; prints the fault table
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# liger-kernel requires triton, which a CPU does not have and these cases do not use.
bench: env  ## time and memory beside public peers, writes runs/benchmarks.json (under 25 minutes, on a quiet machine)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt liger-kernel
	$(BIN)/python -m benchmarks --out runs/benchmarks.json

docs: env  ## the documentation site, in site/; a broken link fails
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/options_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

env: $(ENV)

# torch goes first, at its pinned version, so that no looser pin of another package chooses a different build.
$(ENV): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(ENV)

clean:
	rm -rf .venv runs site
