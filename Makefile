# `make help` says what there is. Everything runs in .venv, which is made and kept up to date on the way.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPES := $(sort $(basename $(notdir $(wildcard recipes/*.yaml))))
OPTIMUM := .venv-optimum
PACKAGES := converters exporters tundish

# What a recipe's target takes; reaches the shell through the environment, so spaces and quotes need no care there.
export MODEL OUT THREADS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-all test-optimum fuzz bench bench-memory bench-peers check format lock schema wheel clean $(RECIPES)

help: ## Show this list
	@echo "make TARGET, where TARGET is one of"
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)$$/\1\t\2/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  %-26s %s\n' "$$name" "$$text"; done
	@echo
	@echo "or a recipe: it is built into dist/<recipe> and verified. MODEL= a folder, a Hub id or 'sample' (default: the"
	@echo "recipe's own model), OUT= another folder, THREADS= how many."
	@echo
	@for name in $(RECIPES); do file=$$name; text=; \
		while [ -z "$$text" ] && [ -n "$$file" ]; do \
			text="$$(sed -nE 's/^description: *//p' "recipes/$$file.yaml")"; \
			file="$$(sed -nE 's/^extends: *//p' "recipes/$$file.yaml")"; done; \
		printf '  %-26s %s\n' "$$name" "$$text"; done
	@echo
	@echo "PYTHON= chooses the Python (3.11 or newer) that .venv is made with; it is python3 now."

setup: $(VENV)/.test-ready ## Make .venv with everything for building, verifying, testing and checking

test: $(VENV)/.test-ready ## Run the fast tests; ARGS= goes to pytest
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.test-ready ## Run all tests, also the slow ones and those that need the network
	$(BIN)/python -m pytest -m "" $(ARGS)

test-optimum: $(VENV)/.test-ready $(OPTIMUM)/.ready ## Open an OpenVINO artifact in optimum-intel, which gets an environment of its own
	$(BIN)/python -m tests.exporters.openvino.optimum_artifact build/optimum
	$(OPTIMUM)/bin/python -m tests.exporters.openvino.optimum_opens build/optimum

# atheris has wheels for Linux on x86 alone; elsewhere inputs are drawn without its guidance.
PARSERS ?= $(shell $(BIN)/python -c 'from tests.fuzz.parsers import PARSERS; print(*PARSERS)')
MINUTES ?= 10

fuzz: $(VENV)/.test-ready ## Fuzz each parser of PARSERS= (all) for MINUTES= (10), one after the other; findings go to build/fuzz
	-$(INSTALL) --quiet atheris==3.0.0
	for name in $(PARSERS); do \
		$(BIN)/python -W ignore -m tests.fuzz.run --parser "$$name" --minutes $(MINUTES) || exit; done

# Where checkpoints and artifacts of benchmarks go: see benchmarks/README.md, also for what ARGS may be.
WORK ?= build/bench

bench: $(VENV)/.test-ready ## Measure conversions of a 3.8 B model, 8 GB, made in WORK= (27 GB); ARGS="--shape small" for less
	$(BIN)/python -m benchmarks.convert --work "$(WORK)" $(ARGS)

bench-memory: $(VENV)/.test-ready ## Measure peak memory at 8, 16 and 32 layers of the same model; ARGS= as above
	$(BIN)/python -m benchmarks.memory --work "$(WORK)" $(ARGS)

bench-peers: $(VENV)/.test-ready ## The same beside other converters, and decode steps; PEERS="ENV ENV" LLAMA_CPP=DIR say where they are
	$(BIN)/python -m benchmarks.convert --work "$(WORK)" --with-peers $(PEERS:%=--peers %) $(LLAMA_CPP:%=--llama-cpp %) $(ARGS)
	$(BIN)/python -m benchmarks.decode --work "$(WORK)" $(PEERS:%=--peers %) $(LLAMA_CPP:%=--llama-cpp %)

check: $(VENV)/.test-ready ## Lint, formatting, types and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

format: $(VENV)/.test-ready ## Format the code and sort imports
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

$(RECIPES): $(VENV)/.build-ready
	@set -- build $@; \
	[ -z "$$MODEL" ] || set -- "$$@" --model "$$MODEL"; \
	[ -z "$$OUT" ] || set -- "$$@" --out "$$OUT"; \
	[ -z "$$THREADS" ] || set -- "$$@" --threads "$$THREADS"; \
	exec $(BIN)/python -m tundish "$$@"

# Two steps, because only tests need torch, whose PyPI build for Linux is several gigabytes.
# pip and setuptools are pinned first: the older ones that come with Python behave differently.
# Warnings are off because setuptools utters one about editable installs in general every time.
INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --disable-pip-version-check --no-input --only-binary :all: -c requirements.lock

$(VENV)/.build-ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tundish needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Choose another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --quiet pip setuptools
	$(INSTALL) --quiet --no-build-isolation -e '.[all]'
	@touch $@

$(VENV)/.test-ready: $(VENV)/.build-ready
	$(INSTALL) --quiet --no-build-isolation -e '.[all,dev]'
	@touch $@

$(OPTIMUM)/.ready: tests/exporters/openvino/optimum.lock
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: -c $< 'optimum-intel[openvino]'
	@touch $@

lock: ## Write requirements.lock anew, with the newest versions that pyproject.toml admits
	rm -rf build
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip setuptools
	build/lock/bin/python -m pip install --quiet --no-build-isolation --only-binary :all: -e '.[all,dev]'
	sed -n '/^#/p' requirements.lock > build/requirements.lock
	build/lock/bin/python -m pip freeze --all --exclude tundish --exclude-editable | sed -E 's/\+[A-Za-z0-9.]+$$//' >> build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build

schema: $(VENV)/.build-ready ## Write recipes/recipe.schema.json anew
	$(BIN)/python -c 'from tundish.recipe import schema_text; print(schema_text(), end="")' > $(VENV)/schema.json
	mv $(VENV)/schema.json recipes/recipe.schema.json

wheel: $(VENV)/.build-ready ## Build the wheel into dist/
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

clean: ## Remove .venv, caches and build leftovers; dist/ stays
	rm -rf $(VENV) $(OPTIMUM) build .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find $(PACKAGES) recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
