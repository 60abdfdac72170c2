## make serve            install what the service needs, train the reference models once, answer on 127.0.0.1:8000
## make serve PORT=9000  the same on another port
## make test             the whole suite; PYTEST_ARGS="-k masks" passes arguments to pytest
## make lint             ruff and mypy
## make bench            how fast passes are on this CPU, beside other libraries; about twelve minutes
## make bench-growth     time to a given error, and how time and memory grow; about eight minutes
## make bench-gpu        the same table on a CUDA device
## make clean            remove the environments, builds and caches; trained models stay
##
## Linux without a GPU, a download of 200 MB instead of gigabytes: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
PORT ?= 8000
STORE ?= models/store
DEFAULT_MODEL ?= noisy-line
PYTEST_ARGS ?=
BENCH_ARGS ?= --rounds 3 --each 0.5 --leave-out compiled,memory

VENV := .venv
BENCH_VENV := .venv-bench
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip --disable-pip-version-check install --no-compile --quiet --quiet --constraint constraints.txt
# On all cores, where pip takes one; a package may hold files that are not meant to compile.
COMPILE := $(RUN) -m compileall -qq -j 0 $(VENV)/lib || true
BENCH_RUN := $(BENCH_VENV)/bin/python
BENCH_INSTALL := $(BENCH_RUN) -m pip --disable-pip-version-check install --quiet --quiet
TORCH := torch==2.13.0

.PHONY: help serve test lint bench bench-growth bench-gpu clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

serve: $(VENV)/ready-to-serve
	@$(RUN) -m models.train --store $(STORE)
	@MCDROP_DEFAULT_MODEL=$(DEFAULT_MODEL) exec $(RUN) -m mcdrop serve $(STORE) --host 127.0.0.1 --port $(PORT)

test: $(VENV)/ready-to-test
	$(RUN) -m pytest -n auto --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/ready-to-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(BENCH_VENV)/ready-to-bench
	$(BENCH_RUN) -m benchmarks.throughput --json benchmarks/results/throughput.json $(BENCH_ARGS)
	$(BENCH_RUN) -m benchmarks.throughput.report

bench-growth: $(BENCH_VENV)/ready-to-bench
	$(BENCH_RUN) -m benchmarks.throughput.error --json benchmarks/results/throughput-error.json
	$(BENCH_RUN) -m benchmarks.throughput.scaling --json benchmarks/results/throughput-scaling.json
	$(BENCH_RUN) -m benchmarks.throughput.report

bench-gpu: $(BENCH_VENV)/ready-to-bench
	$(BENCH_RUN) -m benchmarks.throughput --device cuda --json benchmarks/results/throughput-gpu.json $(BENCH_ARGS)
	$(BENCH_RUN) -m benchmarks.throughput.report

clean:
	rm -rf $(VENV) $(BENCH_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last: an install that was interrupted is done again.
# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/ready-to-serve: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mcdrop needs Python 3.11 or newer; choose one with PYTHON=" if sys.version_info < (3, 11) else 0)'
	@echo "installing what the service needs into $(VENV), once: torch first, which is large"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(TORCH)
	@$(INSTALL) --editable '.[serve,models]'
	@$(COMPILE)
	@touch $@

$(VENV)/ready-to-test: $(VENV)/ready-to-serve
	@echo "installing what the tests and checks need into $(VENV), once"
	@$(INSTALL) --editable '.[dev,zoo]'
	@$(COMPILE)
	@touch $@

# The libraries that the benchmark compares with stay out of $(VENV). They are installed without what they ask for, which
# is a CUDA build of torch; what they import beside it follows, with torch named again so that it stays as it is.
$(BENCH_VENV)/ready-to-bench: pyproject.toml constraints.txt benchmarks/throughput/peers.txt benchmarks/throughput/imports.txt
	@echo "installing the benchmark's environment into $(BENCH_VENV), once"
	@$(BENCH_RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_INSTALL) --constraint constraints.txt $(TORCH)
	@$(BENCH_INSTALL) --constraint constraints.txt --editable '.[onnx,plot]'
	@$(BENCH_INSTALL) --no-deps --requirement benchmarks/throughput/peers.txt
	@$(BENCH_INSTALL) --constraint constraints.txt $(TORCH) --requirement benchmarks/throughput/imports.txt
	@$(BENCH_RUN) -m pip freeze | grep -qx '$(TORCH)\(+.*\)\?' || { echo "another torch than $(TORCH) came in" >&2; exit 1; }
	@touch $@
