# make demo | test | lint | setup; make help lists the rest. Needs python3 (3.11 or later) and make; everything else goes into .venv.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := demo
FAULTS := faults

.PHONY: help setup demo test faults soak lint format docs clean

help:
	@echo "make setup   make .venv with the exact versions of requirements.lock"
	@echo "make demo    write a small music library, train on it, and see what was learned (about 3 minutes on 2 cores)"
	@echo "make test    the tests (about 12 minutes on 2 cores)"
	@echo "make faults  the long tests: killed processes, full disks, a lost server, fuzzing (FAULTS='faults and not whole': without whole commands)"
	@echo "make soak    an hour of loading and of training: are memory, files and threads flat?"
	@echo "make lint    ruff check, ruff format --check, mypy, the order of the packages, generated documents up to date"
	@echo "make docs    write the generated tables and pages of docs/, the README and benchmarks/RESULTS.md"

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python 3.11 or later is needed: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(PY) tools/demo.py $(DEMO)

test: setup
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

soak: setup
	$(PY) benchmarks/soak.py

faults: setup
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "$(FAULTS)"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo --no-cache
	$(PY) tools/make_docs.py --check
	$(PY) benchmarks/report.py --check
	$(PY) benchmarks/real_music/tables.py --check

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: setup
	$(PY) tools/make_docs.py
	$(PY) benchmarks/report.py
	$(PY) benchmarks/real_music/tables.py --write

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
