# make setup | demo | test | check | coverage | mutants | docs | nightly | torches | audit | matrix | bench | bench-compare
PYTHON ?= python3
EXTRAS ?= cuda12,dev
CONSTRAINTS ?= constraints.txt
TORCH  ?= torch
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test check coverage mutants docs nightly torches audit matrix bench bench-compare format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]' '$(TORCH)'
	touch $@

demo: setup
	$(BIN)/gpuckpt train --out out/demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" -q

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

# Lines and branches that the tests reach, of which there is a least share; pages in out/coverage. Half an hour on two cores. Tests
# of seconds run by themselves: tracing makes code slower.
coverage: setup
	$(BIN)/python -m pytest -m "timed and not slow" -q
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not timed" -q --cov --cov-fail-under=93 --cov-report=term --cov-report=html:out/coverage

# Small faults, planted one by one: which do the tests of their room see? A sample; survivors are printed with file and line.
MINUTES ?= 10
mutants: setup
	$(BIN)/python -m tests.mutants --minutes $(MINUTES)

# The site in out/site: guides, and the reference out of the docstrings. A warning is an error.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS),docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

nightly: setup
	$(BIN)/python -m pytest -m slow -q -s
	$(BIN)/python benchmarks/zoo.py --page docs/zoo.md

# The tests with the oldest torch that is supported and with the newest there is; constraints.txt pins the one between.
torches:
	mkdir -p out
	grep -vE '^(torch|triton)==' constraints.txt > out/constraints.txt
	$(MAKE) test VENV=out/oldest-torch CONSTRAINTS=out/constraints.txt TORCH='torch==2.11.*'
	$(MAKE) test VENV=out/newest-torch CONSTRAINTS=out/constraints.txt

# Every kernel, tile, type and architecture through the compiler; half an hour on two cores is the bound.
audit: setup
	timeout 1800 $(BIN)/python benchmarks/dossier.py

# The rivals go to a folder of their own, without what they depend on: no other torch is wanted. Offline they are left out.
bench: setup
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target out/rivals flash-swiglu-mlp==0.4.3 liger-kernel==0.8.5
	$(BIN)/python benchmarks/kernels.py --rivals out/rivals
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target out/rivals ckptplan==0.1.0rc1 checkpoint-schedules==1.0.4 rockmate==2.0.0
	$(BIN)/python benchmarks/planner.py

# A benchmark of this checkout against the same of another revision, in turns: medians and ratios.
BASE   ?= HEAD
SCRIPT ?= checkpoint
ROUNDS ?= 5
bench-compare: setup
	$(BIN)/python benchmarks/compare.py --base $(BASE) --rounds $(ROUNDS) $(SCRIPT) -- $(ARGS)

# The preferred kernels through each version of Triton's compiler that is supported.
matrix: setup
	$(BIN)/python benchmarks/triton_matrix.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build out *.egg-info
