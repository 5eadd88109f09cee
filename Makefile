# Everything runs in .venv, which `setup` makes. CI calls `make test`, as a laptop does.
PYTHON ?= python3
TORCH := torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint clean

setup: $(STAMP)

# The stamp makes a second call quick; a changed pyproject.toml installs again. torch comes first and alone:
# it is the largest by far, and what it resolves to must not depend on the others. Of some 14,000 modules few are ever
# used, so pip compiles none; those of every run are compiled by importing them, else its first processes would, each.
$(STAMP): pyproject.toml $(wildcard llmcad_actors/native/*.c)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile -e ".[dev]"
	$(BIN)/python -c "import ray, transformers.modeling_utils, transformers.models.llama.modeling_llama, llmcad_actors.cli"
	touch $@

demo: setup
	$(BIN)/llmcad demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

# Three processes, as tests wait for the processes they start; in the files' order, which has the long ones first.
test: lint
	$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
