# What a person types. Needs Python >= 3.11 (PYTHON=… names another one); everything else goes into .venv, from the locks.
PYTHON ?= python3
BIN := .venv/bin
# An installed uv is used; without one, pip puts the locked one into .venv.
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/uv)
INSTALL = UV_HTTP_TIMEOUT=300 $(UV) pip install --quiet --python $(BIN)/python
COMPILE = uv pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
	--custom-compile-command "make lock"
TYPED := sr_data sr_models sr_serve sr_train pipelines tools
BENCHMARKS := patch_pool training_step pipeline_overhead whole_pipeline decoding inference basicsr_feed
DIR ?= build/benchmarks
# Two test processes: servers and clusters that start leave a core idle. The end-to-end tests come first, in one.
TOGETHER := -n 2 --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run check lint audit test test-fast bench image format lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

run: .venv/.run  ## set up, then train the small default EDSR (ARGS="--preset …" for more)
	$(BIN)/python pipelines/train_edsr.py $(ARGS)

check: lint audit test  ## set up, then everything that CI checks

lint: .venv/.dev  ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports

audit: .venv/.dev  ## the locked versions: known vulnerabilities, withdrawn releases, abandoned projects
	$(BIN)/python tools/audit_dependencies.py

test: .venv/.dev  ## all tests (ARGS="-k word" picks some)
	$(BIN)/python -m pytest $(TOGETHER) $(ARGS)

test-fast: .venv/.dev  ## without the end-to-end tests
	$(BIN)/python -m pytest $(TOGETHER) -m "not e2e" $(ARGS)

bench: .venv/.dev  ## all benchmarks, small on a CPU and full on CUDA; records in build/benchmarks (DIR=…; ARGS="--rounds 3")
	@for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json $(DIR)/$$name.json $(ARGS) || exit 1; echo; done

image:  ## the nodes' image, without a daemon, and a training run in it (root, buildah, debootstrap; ARGS="--target gpu")
	docker/build_without_daemon.sh $(ARGS)

format: .venv/.dev  ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lock:  ## resolve the versions anew (needs uv; UPGRADE=--upgrade moves them)
	@mkdir -p requirements
	$(COMPILE) $(UPGRADE) pyproject.toml -o requirements/run.txt
	$(COMPILE) $(UPGRADE) pyproject.toml --group dev -c requirements/run.txt -o requirements/dev.txt
	echo uv | $(COMPILE) $(UPGRADE) - -o requirements/uv.txt

clean:  ## remove the environment and every cache (not runs, not MLflow's data)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %s found; 3.11 or newer is needed: make PYTHON=/path/to/python3" % sys.version.split()[0])'
	@if uv --version >/dev/null 2>&1; then uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
	else $(PYTHON) -m venv .venv && $@ -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt; \
	fi || { rm -rf .venv; echo "No environment could be made (Debian: apt install python3-venv)"; exit 1; }

# The project itself is installed editable: pipelines/*.py import the packages from the checkout.
.venv/.run: requirements/run.txt pyproject.toml | $(BIN)/python
	@echo "Installing requirements/run.txt into .venv (several GB with CUDA; once)"
	@$(INSTALL) --require-hashes -r requirements/run.txt
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev: requirements/dev.txt pyproject.toml | .venv/.run
	@$(INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@
