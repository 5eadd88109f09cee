# Everything runs in .venv, which `setup` makes. CI calls `make test`, as a laptop does.
PYTHON ?= python3
TORCH := torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint clean

setup: $(STAMP)

# The stamp makes a second call quick; a changed pyproject.toml installs again. torch comes first and alone:
# it is the largest by far, and what it resolves to must not depend on the others.
$(STAMP): pyproject.toml $(wildcard llmcad_actors/native/*.c)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
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
