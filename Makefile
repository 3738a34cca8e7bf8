# Two commands on a fresh machine: `make demo` and `make test`. Both set up what they need.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One more than the cores of a small machine: the end-to-end tests wait for daemons and servers much of the time.
WORKERS ?= 3

# Where images go and what they are called: REPOSITORY/serving:TAG and so on (deploy/images/README.md).
REPOSITORY ?= offer-assets
TAG ?= $(shell git rev-parse HEAD)
IMAGES ?= serving training neuron dagster
BUILD_ARGUMENTS ?=
# The Dagster UI that `make train` asks (default: OFFER_ASSETS_UI_URL), and what it compiles for.
DAGSTER_URL ?=
TARGET ?= cpu

.PHONY: help demo dev test lint format stop benchmarks demo-drift demo-taxonomy clean \
  audit images push deploy train
.DEFAULT_GOAL := help

help: ## Say what each command does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## The whole graph on the demo feed (or OFFER_FEED), headless, to a live endpoint
	@$(BIN)/python -m offer_assets demo

demo-drift: $(VENV)/.installed ## Add a drifted day to the demo feed, catalogue it, see checks fail and alerts raised
	@$(BIN)/python -m offer_assets demo-drift

demo-taxonomy: $(VENV)/.installed ## Put the next version of the demo feed's taxonomy into the watched folder; `make dev` follows it
	@$(BIN)/python -m offer_assets demo-taxonomy

dev: $(VENV)/.installed ## The Dagster UI with daemon, sensors and schedules, on the same data
	@$(BIN)/python -m offer_assets dev

stop: $(VENV)/.installed ## Stop the local endpoint
	@$(BIN)/python -m offer_assets stop

test: lint ## Every test (set REQUIRE_SYSTEM_PACKAGES=1 to fail instead of skip without Chromium)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

lint: $(VENV)/.installed-dev ## Format, lint, types and the walls between the rooms
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Bring the code into shape
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

benchmarks: $(VENV)/.installed-dev ## Measure what needs no data but the demo feed's (docs/figures.md names a program for every figure)
	@$(BIN)/python -m benchmarks

audit: $(VENV)/.installed-audit ## Hold every pinned dependency against the known vulnerabilities (needs the network)
	@$(BIN)/pip-audit --requirement constraints.txt --strict --no-deps --disable-pip --progress-spinner off

images: ## Build the images (IMAGES, REPOSITORY, TAG, BUILD_ARGUMENTS; needs Docker)
	@set -e; for image in $(IMAGES); do \
	  docker build --file deploy/images/$$image.Dockerfile --tag $(REPOSITORY)/$$image:$(TAG) \
	    --build-arg CODE_REVISION=$(TAG) $(BUILD_ARGUMENTS) .; done

push: ## Push what `make images` built (log in to the registry first)
	@set -e; for image in $(IMAGES); do docker push $(REPOSITORY)/$$image:$(TAG); done

deploy: ## Start or replace Dagster's containers on this machine at TAG (deploy/compose.example.yaml)
	@REPOSITORY=$(REPOSITORY) TAG=$(TAG) docker compose --file deploy/compose.example.yaml up --detach --wait

train: $(VENV)/.installed ## Train and release on a deployment (DAGSTER_URL, TARGET) and wait for the outcome
	@$(BIN)/python -m offer_assets launch train_and_release --partition $(TARGET) \
	  $(if $(DAGSTER_URL),--url $(DAGSTER_URL))

clean: ## Remove the virtual environment and caches (not OFFER_ASSETS_HOME)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] <= (3, 12) else \
	  f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=/path/to/python3.11")'
	@echo "Making the virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing the pinned dependencies (a few minutes the first time)"
	@$(RUN_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(RUN_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-audit: $(BIN)/python pyproject.toml constraints.txt
	@$(RUN_INSTALL) pip-audit
	@touch $@
