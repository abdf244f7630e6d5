# make install            the package, editable, with its development tools, into .venv
# make demo [SYSTEM=var]  train, sample and evaluate one system from nothing, into demo/$(SYSTEM)
# make test               the test suite (TESTARGS="-k name" for a part of it)
# make lint               ruff and mypy
#
# Each makes .venv first when it is missing, broken, half made, moved, or older than pyproject.toml.
# PYTHON=python3.13 chooses the interpreter; by default it is the first one found that is new enough.

PYTHON ?=
SYSTEM ?= var
EXTRAS ?= dev
TESTARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
COMPILER := $(VENV)/.compiler
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)

# Succeeds for an interpreter that starts and is new enough, and, where PYTHON is given, of its version.
define SHELL_FUNCTIONS
new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
version() { "$$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null; }; \
usable() { new_enough "$$1" && \
  { [ -z "$(PYTHON)" ] || [ "$$(version "$$1")" = "$$(version "$(PYTHON)")" ]; }; }
endef

# The stamp holds the folder it was made in: a virtual environment does not survive a move.
READY := $(shell $(SHELL_FUNCTIONS); \
  [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && usable $(BIN)/python && echo yes)

.PHONY: install demo test lint
.DEFAULT_GOAL := install

install: $(STAMP)
	@echo "ready: $$($(BIN)/python --version), $(BIN)/python experiments/..."

demo: $(STAMP)
	$(BIN)/python experiments/demo.py --system=$(SYSTEM) --workdir=demo/$(SYSTEM)

test: $(STAMP) $(COMPILER)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The TPU compiler, half a GB that only tests and compile_ahead.py need.
$(COMPILER): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[ahead]'
	@touch $@

# The marker of an unfinished installation is written first and removed last, so that one that
# was interrupted anywhere starts from nothing the next time.
$(STAMP): pyproject.toml $(if $(READY),,FORCE)
	@set -e; $(SHELL_FUNCTIONS); \
	reusable() { [ ! -e $(UNFINISHED) ] && usable $(BIN)/python && \
	  { [ ! -e $(STAMP) ] || [ "$$(cat $(STAMP))" = "$(CURDIR)" ]; } && \
	  $(BIN)/python -m pip --version >/dev/null 2>&1; }; \
	if ! reusable; then \
	  python=; \
	  for candidate in $(CANDIDATES); do \
	    if new_enough "$$candidate"; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 or newer found (tried: $(CANDIDATES))." >&2; \
	    echo "       Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version) ($$python)"; \
	  rm -rf $(VENV).old; \
	  if [ -e $(VENV) ] || [ -L $(VENV) ]; then mv $(VENV) $(VENV).old; rm -rf $(VENV).old; fi; \
	  mkdir $(VENV); : > $(UNFINISHED); \
	  "$$python" -m venv $(VENV) || { \
	    echo "error: '$$python -m venv' failed. Debian and Ubuntu keep ensurepip in a package" >&2; \
	    echo "       of its own: apt-get install python3-venv, then the same command again." >&2; \
	    exit 1; }; \
	fi; \
	: > $(UNFINISHED); rm -f $(STAMP); \
	echo "installing ar_jax and its dependencies (about 1.2 GB on disk)"; \
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]' || { \
	  echo "error: the installation failed, see above; the same command again starts afresh." >&2; \
	  exit 1; }; \
	$(BIN)/python -c 'import jax, flax, ar_jax' || { \
	  echo "error: the installed packages cannot be imported, see above." >&2; exit 1; }; \
	rm -f $(UNFINISHED); printf '%s\n' "$(CURDIR)" > $(STAMP)

.PHONY: FORCE
FORCE:
