# make train | test | test-all | soak | mutants | lightning-suite | docs | docs-serve | lint | types | format | clean, from a fresh clone. Needs Python >= 3.10 with pip, and make.
PYTHON ?= python3
# More overrides for the run: make train ARGS="model=cnn sparsity.forward_sparsity=0.95"
ARGS ?=
# Two worker processes of one thread each.
PYTEST_ARGS ?= -n 2 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --progress-bar off -c constraints.txt
SOURCES := src tests $(wildcard examples benchmarks reliability docs)

.PHONY: train test test-slow test-all soak mutants lightning-suite docs docs-serve lint types format clean
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/topkast-train $(ARGS)

# At most five minutes on two free cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) $(ARGS)

# What that leaves out: sweeps, several processes, interpreted kernels, benchmarks, whole pages.
test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS) $(ARGS)

test-all: test test-slow

# Half an hour of randomised runs, or so long: make soak ARGS="--minutes 1"
soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python reliability/soak.py $(ARGS)

# Small changes of the code that its tests should notice, hours of them; or some: make mutants ARGS="method/schedule.py --sample 20"
mutants: $(VENV)/.installed-dev
	$(INSTALL) -e '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python reliability/mutants.py $(ARGS)

# Lightning's own tests with our callback in every Trainer: make lightning-suite ARGS="TREE", a source tree of the installed version
lightning-suite: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python reliability/lightning_suite.py $(ARGS)

# The documentation, in build/site; any warning is an error. The variable silences its theme's announcement.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# ... on a local port, built anew whenever a page is saved.
docs-serve: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The environment stays.
clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) conf -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, $(PYTHON) is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[report]'
	@touch $@

# A torchvision built for another torch (PyPI's, beside a CPU-only torch) makes `import lightning` fail.
# Then it goes to a folder of its own, which only the tests that need it put on their path.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	rm -rf $(VENV)/vision
	$(INSTALL) --no-deps torchvision
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || { \
	  echo "torchvision does not fit this build of torch: kept apart, in $(VENV)/vision"; \
	  $(PIP) uninstall --yes --quiet torchvision; \
	  $(INSTALL) --quiet --no-deps --target $(VENV)/vision torchvision; }
	@touch $@ $(VENV)/.installed
