# make demo and make test set everything up themselves, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check format lint types contracts faults claims claims-quick bench docs clean install

help:
	@echo "make demo     inspect the built-in model, quantize it by five methods, write runs/demo/report.html"
	@echo "make test     the tests (slow and GPU ones: $(BIN)/pytest -m slow, -m gpu)"
	@echo "make check    format, lint, types, import contracts"
	@echo "make faults   kill, fill the disk, damage files: what happens, as a table (docs/reliability.md)"
	@echo "make claims   measure again what each paper claims (claims-quick: try every script, in minutes)"
	@echo "make bench    wall time and memory"
	@echo "make docs     write the generated pages of docs/"
	@echo "make clean    remove $(VENV) and every cache"

install: $(INSTALLED)

# torch goes first and alone: it is the one large download, and any build of it that is already there is kept.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else "Postlude needs Python 3.11 or newer, and $(PYTHON) is " + v + ": make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,gpu]'
	@touch $@

demo: install
	$(BIN)/postlude demo -o runs/demo --overwrite

# As many processes as there are cores, one thread each: the tensors of tests are too small for more. Compiled files
# are kept whatever the environment says: without them every process of the tests compiles everything again.
test: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

check: format lint types contracts

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

contracts: install
	$(BIN)/lint-imports

faults: install
	$(BIN)/python -m faults

claims: install
	for file in claims/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

claims-quick: install
	$(BIN)/python claims/_quick.py

bench: install
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

docs: install
	$(BIN)/python -m postlude.cli.catalogue > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
