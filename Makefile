# `make` prints what there is. Everything runs in .venv, which the first target that needs it makes (some minutes; later
# calls start at once) and which is brought up to date when setup.py or the pinned versions change.
#
# A second Python beside the first:                        make test PYTHON=python3.12 VENV=.venv312
# torch's CPU build, where pip would pick the CUDA one:    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARITY_STAMP := $(VENV)/.installed-parity
BENCH_VENV ?= .venv-bench
PEERS_STAMP := $(VENV)/.installed-peers
BENCH_RESULTS ?= bench-results
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

ifndef PYTHON
  PYTHON = $(firstword $(foreach name,python3.11 python3.12,$(if $(call version,$(name)),$(name))) python3)
else ifneq ($(wildcard $(STAMP)),)
  ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)/python))
    $(error $(VENV) was made with another Python than $(PYTHON): run `make clean` first, or give another VENV=)
  endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-parity bench bench-full bench-env peers readme checks lint types format clean

help:
	@echo 'make quickstart [MODEL=dir DATA=file SHORT=1]   preference data -> trained policy -> report, on this machine'
	@echo 'make test [ARGS="-k name"]                      all tests that can run on this machine'
	@echo 'make test-parity [ARGS="-k name"]               install TRL and compare our losses with its own'
	@echo 'make bench                                      all benchmarks, short (15 minutes); table and plots of README.md'
	@echo 'make bench-full                                 the same, long (hours)'
	@echo 'make bench-env                                  only make or update the environment of the benchmarks'
	@echo 'make checks                                     lint + types'
	@echo 'make lint                                       ruff: rules and formatting'
	@echo 'make types                                      mypy'
	@echo 'make format                                     let ruff rewrite the files'
	@echo 'make readme                                     write the table of methods into README.md'
	@echo 'make setup                                      only make or update the environment'
	@echo 'make clean                                      remove the environment and the caches'
	@echo
	@echo 'The environment is $(VENV) (VENV=...), made with python3.11 or python3.12 (PYTHON=...).'

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py \
	  $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(if $(SHORT),--short)

# The whole suite goes side by side; chosen tests one after the other, so that `-s` and `-x` do what they say.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(ARGS),--numprocesses auto --maxprocesses 4 --dist loadfile)

test-parity: $(PARITY_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/parity $(ARGS)

checks: lint types

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy rpo_megatron

bench bench-full: bench-env
	$(BENCH_VENV)/bin/python -m tools.bench.suite $(if $(filter bench,$@),--short) --results '$(BENCH_RESULTS)'

# What is measured beside ours gets an environment of its own.
bench-env:
	@$(MAKE) --no-print-directory peers VENV='$(BENCH_VENV)'

peers: $(PEERS_STAMP)

readme: $(STAMP)
	$(BIN)/python tools/update_readme.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

# An environment that is there keeps its Python.
interpreter = $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
constraints = tools/env/constraints-py$(subst .,,$(call version,$(interpreter))).txt

# The stamp is removed first and written last: an install that was interrupted is begun anew.
$(STAMP): setup.py $(wildcard tools/env/constraints-*.txt)
	@case '$(call version,$(interpreter))' in 3.11 | 3.12) ;; *) \
	  echo "error: '$(PYTHON)' is not Python 3.11 or 3.12; install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1;; esac
	@test -e $@ || { echo 'making $(VENV) with $(PYTHON)' && $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $@
	@echo 'installing torch'
	@$(PIP) --constraint $(constraints) torch
	@echo 'installing rpo_megatron, editable, with what it needs ($(constraints))'
	@$(PIP) --constraint $(constraints) --editable '.[dev]'
	@touch $@

$(PEERS_STAMP): $(STAMP)
	@echo 'installing what the benchmarks compare with'
	@$(PIP) --constraint $(constraints) --editable '.[bench,fast]'
	@touch $@

$(PARITY_STAMP): $(STAMP)
	@echo 'installing TRL'
	@$(PIP) --constraint $(constraints) --editable '.[parity]'
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(BENCH_RESULTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
