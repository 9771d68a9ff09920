# Two commands do everything on a fresh Linux machine: `make demo` and `make test`. `make help` lists the rest.
#
#   PYTHON=…       the interpreter that makes the environment (default: the first of python3.12 … python3 that is new enough)
#   VENV=…         where the environment lives (default .venv)
#   NO_INSTALL=1   install nothing: use the python3 on the path, as it is
#   LOCK=newest    the newest versions that are tested, in .venv-newest, on the newest Python that is found
#   JOBS=…         test processes (default 2);  ARGS=…  handed on to `moekit decode` or pytest

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test newest against sanitize lint lock clean

VENV ?= .venv$(LOCK:%=-%)
JOBS ?= 2
ARGS ?=

NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 12))
CANDIDATES := $(or $(PYTHON),$(if $(LOCK),python3.14 python3.13 python3.12,python3.12 python3.13 python3.14) python3)
FOUND = $(shell for p in $(CANDIDATES); do $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)
WRONG = moekit needs Python 3.12 or newer with venv, and none of these is one: $(CANDIDATES); name one with PYTHON=…

TEST_LOCK = requirements/test$(LOCK:%=-%).lock
DEMO_LOCK = $(if $(LOCK),$(TEST_LOCK),requirements/$(if $(shell nvidia-smi -L 2>/dev/null),demo-cuda,demo).lock)
# A stamp is named after what it stands for, so a changed lock installs anew and nothing else does.
stamp = $(VENV)/.$(basename $(notdir $(1)))-$(shell cat $(1) pyproject.toml | sha256sum | cut -c1-16)

ifdef NO_INSTALL
PY := PYTHONPATH=. python3
DEMO_READY :=
TEST_READY :=
else
PY := $(VENV)/bin/python
DEMO_READY := $(call stamp,$(DEMO_LOCK))
TEST_READY := $(call stamp,$(TEST_LOCK))
endif

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(DEMO_READY) ## install what the decode needs (no torch) and run `moekit decode`: the tiny model answers
	@$(PY) -m moekit.cli decode $(ARGS)

test: $(TEST_READY) ## install everything and run the tests, those for a GPU too where there is one
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# What tells most of new versions in few minutes: imports, compilation for the targets, the faces, parity with transformers.
NEWEST = tests/test_compat.py tests/test_imports.py tests/cli/test_doctor.py tests/backends/test_targets.py \
	tests/backends/test_h200.py tests/jax/test_face.py tests/jax/test_view.py tests/torch/test_launch.py \
	tests/torch/test_compile.py tests/torch/test_patch_versions.py tests/models/test_h200.py \
	tests/models/test_parity.py::test_float32_logits_and_greedy_tokens[four-layers-1] \
	tests/models/test_parity.py::test_generate_gives_the_greedy_tokens[1-xla]
newest: ## with the newest versions (docs/versions.md), the tests that hang on versions most
	@$(MAKE) test LOCK=newest ARGS="$(NEWEST) $(ARGS)"

against: $(TEST_READY) ## the tests of `patch` against another transformers: VERSION=5.9.0
	@$(lastword $(PY)) -m pip install --quiet --disable-pip-version-check --target build/transformers-$(VERSION) \
		transformers==$(VERSION) $$(grep '^numpy=' $(TEST_LOCK))
	@PYTHONPATH=build/transformers-$(VERSION):. $(lastword $(PY)) -m pytest tests/torch/test_patch*.py $(ARGS)

sanitize: $(TEST_READY) ## every kernel under compute-sanitizer's memcheck and racecheck (on a GPU machine)
	@$(PY) -m moekit.testing.sanitize $(ARGS)

lint: $(TEST_READY) ## ruff and pyright
	@$(PY) -m ruff check .
	@$(PY) -m pyright

lock: $(TEST_READY) ## resolve the lock files anew
	@$(PY) requirements/lock.py

clean: ## remove the environment and all caches
	@rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What a stamp stands for is read off its name: .venv/.demo-cuda-1234 is requirements/demo-cuda.lock.
$(VENV)/.%: | $(VENV)/bin/python
	@$(VENV)/bin/python -c '$(NEW_ENOUGH)' || { echo "$(VENV) holds an older Python than 3.12: run 'make clean' first"; exit 1; }
	@name=$*; name=$${name%-*}; pip="$(VENV)/bin/python -m pip --quiet --disable-pip-version-check"; \
	echo "installing requirements/$$name.lock into $(VENV)"; \
	$$pip install -r requirements/$$name.lock; \
	PYTHONWARNINGS=ignore $$pip install --no-deps --no-build-isolation -e .; \
	rm -f $(VENV)/.$$name-????????????????
	@touch $@

$(VENV)/bin/python:
	$(if $(FOUND),,$(error $(WRONG)))
	@$(FOUND) -m venv $(VENV)
