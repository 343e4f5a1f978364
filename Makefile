# make test and make demo set up a virtual environment, build, and do their work; nothing else to type.
#   PYTHON=python3.12   the Python to make the environment from      VENV=folder   where it goes
#   TORCH=torch==2.13.0 the torch to install where there is none     ARGUMENTS=... passed on to pytest or the demo
# A Python that has a CUDA build of torch beside a visible GPU lends its packages to the environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGUMENTS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)
HAS_HEADERS := import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))
HAS_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())

.PHONY: test demo build check bench clean

test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGUMENTS)

demo: $(VENV)/.built
	$(BIN)/condgen-fast demo $(ARGUMENTS)

build: $(VENV)/.built

check: $(VENV)/.checkers
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGUMENTS)

clean:
	rm -rf build dist *.egg-info condgen_fast/*.so $(VENV)/.built $(VENV)/.installed $(VENV)/.checkers

# An environment that is there already is taken as it is.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); name a Python of 3.10 or later: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or later is needed; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c '$(HAS_HEADERS)' || \
	  { echo "$(PYTHON) has no C headers (Python.h); on Debian and Ubuntu: apt install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is needed; on Debian and Ubuntu: apt install g++"; exit 1; }
	@if $(PYTHON) -c '$(HAS_GPU)' 2>/dev/null; \
	  then echo "Using the torch of $(PYTHON), which sees a GPU"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "Installing $(TORCH)"; $(PIP) install "$(TORCH)"; }
	$(PIP) install "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" ninja
	$(PIP) install --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.checkers: | $(BIN)/python
	$(PIP) install ruff clang-format
	@touch $@
