# Two commands do all set-up themselves: `make demo` and `make test`.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: demo smoke test check lint fast gpu setup bench mutate crash faults endurance docs clean help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	@python=; for name in python3 python3.13 python3.12 python3.11; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then echo "ppomax needs Python 3.11 or newer on the PATH" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY) ## virtual environment with pinned packages

demo: $(READY) ## SFT, reward model, PPO-max, evaluation, report on SmolLM2-135M (OUT=DIR)
	$(BIN)/ppomax demo --out $(OUT)

smoke: $(READY) ## the same path with a tiny model, in a minute
	$(BIN)/ppomax demo --smoke --out $(OUT)

test: $(READY) ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

check: lint fast ## what every commit passes

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fast: $(READY) ## tests of less than a second
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu'

gpu: $(READY) ## tests on a CUDA device
	$(BIN)/python -m pytest -m gpu tests/rollout/test_cuda.py

mutate: $(READY) ## break the mathematics on purpose and see the tests fail
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutate.py

crash: $(READY) ## SIGKILL at every write of a checkpoint and at random times, resume, compare
	$(BIN)/python benchmarks/crash.py

faults: $(READY) ## every write of a run fails in turn: full disk, then broken disk
	$(BIN)/python benchmarks/faults.py --error ENOSPC
	$(BIN)/python benchmarks/faults.py --error EIO

endurance: $(READY) ## thousands of PPO iterations: memory, open files, time of an iteration
	$(BIN)/python benchmarks/endurance.py

bench: $(READY) ## every benchmark with few rounds, ratios first (benchmarks/README.md)
	@for script in "tiny" "ppo_iteration --rounds 3" "scaling --rounds 3" "memory" "vllm_rollout --rounds 3" "gpu"; do \
	  echo "== $$script"; set -- $$script; $(BIN)/python benchmarks/$$1.py "$${@:2}" || echo "$$1: failed; run it alone to see why"; done

docs: $(READY) ## docs/metrics.md from the declarations
	$(BIN)/python -c 'from ppomax.monitors import as_markdown; print(as_markdown(), end="")' > docs/metrics.md

clean: ## remove the environment and what tools left
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
