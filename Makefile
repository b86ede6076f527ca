# Everything a person types. `make demo` and `make test` work on a fresh clone with Python 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
# freed pages are kept: small networks allocate the same few megabytes every step
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.PHONY: demo sweep league test chromium faults slow lint bench bench-serve docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a one-step Fashion-MNIST generator and score it (about 10 minutes on two cores)"
	@echo "make sweep      which TTUR ratio? six short trials and a report (about 10 minutes on two cores)"
	@echo "make league     25 methods with equal compute, one table (about 25 minutes of one core; goes on if repeated)"
	@echo "make test       the test suite (under 12 minutes on two cores)"
	@echo "make faults     every fault met on purpose: kills, full disks, collapses; half a minute and more each"
	@echo "make slow       the tests that make test leaves out"
	@echo "make lint       ruff"
	@echo "make bench      the ratios the README quotes"
	@echo "make bench-serve  what a server stands: answers a second, and their times below, at and above that (5 minutes)"
	@echo "make docs       write docs/keys.md, the page of all keys, from the settings models"
	@echo "make clean      remove caches and build products; runs and .venv stay"

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python jobs/distill.py recipe=fashion_mnist

sweep: $(VENV)/.ready
	$(BIN)/python jobs/sweep.py space=ttur recipe=fashion_mnist_short search=grid seeds=2 finalists=2 \
		evaluate.every_images=1600

league: $(VENV)/.ready
	$(BIN)/python jobs/league.py out=league

test: $(VENV)/.ready chromium
	$(BIN)/python -m pytest

# what the pages are tested in
chromium:
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) \
		|| { echo "make test opens pages in Chromium; install it as root: apt-get install chromium"; exit 1; }

faults: $(VENV)/.ready
	$(BIN)/python tests/faults.py

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	test ! -e platform/__init__.py

bench: $(VENV)/.ready
	$(BIN)/python tests/bench.py

bench-serve: $(VENV)/.ready
	$(BIN)/python tests/bench_serve.py

docs: $(VENV)/.ready
	$(BIN)/python docs/keys.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache platform/*.egg-info
	find platform jobs tests -name __pycache__ -prune -exec rm -rf {} +
