# orthokit from a fresh clone: `make report` or `make test`. Needs Python 3.11 or newer, make and a network.
#
#   make report ARGS="02_momentum_spectral_filter --size smoke"    ARGS goes to the command behind the target
#   make test PYTHON=python3.12                                    PYTHON names the Python to use

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
NOTEBOOK_KEYS := metadata.papermill cell.metadata.papermill metadata.language_info.version

# Brings .venv up to the extras named; takes a moment when it already holds them.
define prepare
@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "orthokit: there is no $(PYTHON) on this machine: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
@"$(PYTHON)" tools/bootstrap.py $(1)
endef

.DEFAULT_GOAL := help
.PHONY: help report test lab dash bench doctor lint setup clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

report: ## run the notebooks and write one offline HTML report; prints the path of its index
	$(call prepare,notebooks widgets pretrained)
	@$(BIN)/orthokit report $(ARGS)

test: ## run every test, on up to four cores; ARGS="-n 0" for one process
	$(call prepare,dev)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lab: ## JupyterLab on the notebooks
	$(call prepare,notebooks widgets pretrained)
	@$(BIN)/jupyter-lab notebooks/00_start_here.ipynb $(ARGS)

dash: ## the live pages, in a browser on this machine
	$(call prepare,notebooks widgets pretrained)
	@$(BIN)/orthokit dash $(ARGS)

bench: ## side by side with peers, as ratios within one run
	$(call prepare,dev)
	@$(BIN)/python -m benchmarks $(ARGS)

doctor: ## what is here, what is missing, and the command that mends it
	$(call prepare,notebooks widgets pretrained)
	@$(BIN)/orthokit doctor $(ARGS)

lint: ## style, types, layers, notebooks without outputs
	$(call prepare,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify --extra-keys "$(NOTEBOOK_KEYS)" notebooks/*.ipynb

setup: ## only make .venv, with everything the tests need
	$(call prepare,dev)

clean: ## remove .venv, caches and build products; runs/ and reports/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find orthokit widgets tests tools benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} +
