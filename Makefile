# Two commands: `make demo` shows the main job, `make test` runs the whole suite.
# Both set up .venv by themselves; `make setup` only installs.

PY := .venv/bin/python
# Options of the demo: TRACE=FILE FORMAT=azure|mooncake RATE=x TOKENS=x SEED=n
DEMO_OPTIONS = $(if $(TRACE),--trace '$(TRACE)') $(if $(FORMAT),--format '$(FORMAT)') \
  $(if $(RATE),--rate '$(RATE)') $(if $(TOKENS),--tokens '$(TOKENS)') $(if $(SEED),--seed '$(SEED)')

.PHONY: help setup setup-test demo test lint check bench-delta lock clean

help:
	@echo 'make demo    the main job on this machine (options: TRACE=FILE FORMAT=azure|mooncake RATE=x TOKENS=x SEED=n)'
	@echo 'make test    the whole test suite'
	@echo 'make lint    ruff, mypy, layer contracts'
	@echo 'make check   lint and test, what CI runs'
	@echo 'make setup   only install, into .venv'
	@echo 'make bench-delta   bytes per changed element of the weight codec, beside others'

setup:
	@tools/setup.sh runtime

setup-test:
	@tools/setup.sh test

demo: setup
	@$(PY) -m rowen.bench.demo $(DEMO_OPTIONS)

test: setup-test
	@$(PY) -m pytest $(PYTEST_OPTIONS)

lint: setup-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

check: lint test

bench-delta: setup
	@$(PY) -m rowen.bench.delta

lock:
	requirements/lock.sh

clean:
	rm -rf out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
