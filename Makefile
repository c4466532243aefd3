# make demo | test | docs | wheel | setup | format | clean        FLAVOUR=gpu takes the CUDA builds; the flavour stays until another is named
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
FLAVOUR ?= $(if $(wildcard $(VENV)/.gpu),gpu,cpu)
ifeq ($(filter cpu gpu,$(FLAVOUR)),)
$(error FLAVOUR is cpu or gpu, found '$(FLAVOUR)')
endif
STAMP := $(VENV)/.$(FLAVOUR)
REQUIREMENTS := requirements/$(FLAVOUR).txt
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
FITS := import sys, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(FITS)' >/dev/null 2>&1 && echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH = $(shell grep '^torch=' $(REQUIREMENTS))
# Modules are compiled when they are first imported, and that is kept: importing torch takes twice as long without.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test docs wheel setup format clean

demo: $(STAMP)
	@$(BIN)/recsys demo $(ARGS)

test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: export POLARS_MAX_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 3 --dist worksteal -rs $(ARGS)

docs: $(STAMP)
	$(BIN)/mkdocs build --strict $(ARGS)

# build/lib may hold modules that are gone
wheel: $(STAMP)
	@rm -rf build/lib build/bdist* dist
	@$(PIP) wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

setup: $(STAMP)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Another flavour, or a set-up that was cut short, starts from an empty environment; changed requirements are brought up to date.
$(STAMP): pyproject.toml $(REQUIREMENTS) requirements/pins.txt packaging/fbgemm-gpu/pyproject.toml
	@$(or $(PYTHON),python3) -c '$(FITS)' >/dev/null 2>&1 || { \
		found=$$($(or $(PYTHON),python3) --version 2>&1 | head -n 1); \
		echo "Python 3.11 or newer with venv is needed, found: $${found:-none}; install it and name it: make setup PYTHON=python3.11" >&2; \
		exit 2; }
	@echo "Setting up $(VENV) ($(FLAVOUR)), once: some minutes"
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@# A CPU wheel of torch that pip's own settings find comes before the index of CPU builds; then the rest leaves torch alone.
	@[ $(FLAVOUR) = gpu ] \
		|| $(PIP) install -qq --no-compile --no-index --no-deps $(TORCH) 2>/dev/null \
		|| $(PIP) install -qq --no-compile --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH) \
		|| { echo "No CPU build of $(TORCH) was found; give TORCH_CPU_INDEX=URL or PIP_FIND_LINKS=FOLDER" >&2; exit 2; }
	@$(PIP) install -qq --no-compile --requirement $(REQUIREMENTS)
	@$(PIP) check
	@touch $@
	@echo "$(VENV) is ready"
