# Everything runs through here. INSTALL=0 uses $(PYTHON) as it is: no .venv, no network.
PYTHON  ?= python3
INSTALL ?= 1
DEVICE  ?= auto
SUITE   ?= quick
OUT     ?= runs/$(notdir $(basename $(SUITE)))
JOBS    ?= 1
WORKERS ?= 2
TOY     ?=
PYTEST_ARGS ?=
SOURCES := petlbench methods tasks tests docs

.DEFAULT_GOAL := help
.PHONY: help bench test microbench lint types docs pretrain tree clean

ifeq ($(INSTALL),0)
  INTERPRETER := $(PYTHON)
  READY := tree
  # The safe path keeps this folder off sys.path: petlbench would be found in it without its methods and tasks.
  RUN := PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/tree$${PYTHONPATH:+:$$PYTHONPATH}" $(INTERPRETER)
else
  INTERPRETER := "$(CURDIR)/.venv/bin/python"
  READY := .venv/.installed-test
  LINTERS := .venv/.installed-lint
  SITE := .venv/.installed-docs
  RUN := $(INTERPRETER)
endif

help: ## this text
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@echo "variables: SUITE=$(SUITE) OUT=$(OUT) DEVICE=$(DEVICE) JOBS=$(JOBS) WORKERS=$(WORKERS) PYTHON=$(PYTHON) INSTALL=$(INSTALL)"

bench: $(READY) ## run SUITE into OUT and print the leaderboard; run again to continue
	$(RUN) -m petlbench run $(SUITE) --out $(OUT) --device $(DEVICE) --jobs $(JOBS)

# WORKERS processes (0: this one alone), each of one thread, as is what it starts.
test: $(READY) ## the fast tests; PYTEST_ARGS='-m slow' for the others
	OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 $(RUN) -m pytest --import-mode=append -n $(WORKERS) --dist worksteal \
		-m "not slow" $(PYTEST_ARGS)

microbench: $(READY) ## time training and prediction steps; compare with the last stored run
	TOY=$(TOY) $(RUN) -m pytest --import-mode=append tests/benchmarks -o python_files='bench_*.py' -q -s \
		$(if $(TOY),,--benchmark-autosave --benchmark-compare) --benchmark-columns=median,iqr,rounds $(PYTEST_ARGS)

lint: types ## ruff and mypy
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)

types: tree ## mypy alone
	cd build/tree && $(RUN) -m mypy --config-file "$(CURDIR)/setup.cfg" --cache-dir "$(CURDIR)/.mypy_cache" -p petlbench

docs: $(SITE) tree ## the web site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

pretrain: $(READY) ## train the embedded backbone again
	$(RUN) -m petlbench.commands.pretrain

# The package as it is when installed: methods/ and tasks/ in their places, and its entry points. Made anew every time.
tree: $(LINTERS)
	@rm -rf build/tree && mkdir -p build/tree
	@$(INTERPRETER) -c "from setuptools import setup; setup()" -q \
		egg_info --egg-base build/tree build_py --build-lib build/tree

clean: ## remove builds and caches; results and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Done once; done again when one of these files changes.
.venv/.installed-%: setup.cfg pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -e '.[$*]' -c constraints.txt
	touch $@
