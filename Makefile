## make serve            install what the service needs, train the reference models once, answer on 127.0.0.1:8000
## make serve PORT=9000  the same on another port
## make test             the whole suite; PYTEST_ARGS="-k masks" passes arguments to pytest
## make lint             ruff and mypy
## make bench            how fast passes are on this CPU, beside a plain loop; some minutes
## make clean            remove .venv, builds and caches; trained models stay
##
## Linux without a GPU, a download of 200 MB instead of gigabytes: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
PORT ?= 8000
STORE ?= models/store
DEFAULT_MODEL ?= noisy-line
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt

.PHONY: help serve test lint bench clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

serve: $(VENV)/ready-to-serve
	@$(RUN) -m models.train --store $(STORE)
	@MCDROP_DEFAULT_MODEL=$(DEFAULT_MODEL) exec $(RUN) -m mcdrop serve $(STORE) --host 127.0.0.1 --port $(PORT)

test: $(VENV)/ready-to-test
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/ready-to-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/ready-to-test
	$(RUN) -m benchmarks.throughput --json benchmarks/results/throughput.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last: an install that was interrupted is done again.
# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/ready-to-serve: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mcdrop needs Python 3.11 or newer; choose one with PYTHON=" if sys.version_info < (3, 11) else 0)'
	@echo "installing what the service needs into $(VENV), once: torch first, which is large"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) --editable '.[serve,models]'
	@touch $@

$(VENV)/ready-to-test: $(VENV)/ready-to-serve
	@echo "installing what the tests and checks need into $(VENV), once"
	@$(INSTALL) --editable '.[dev,zoo]'
	@touch $@
