# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lidit needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## 1,000 rendered scenes: captioned, both captions embedded by two tiny LLMs, encoded, verified; a page to look at
	$(BIN)/python pipelines/embed.py --store ./store --text '[caption,caption_original]'
	$(BIN)/python pipelines/latents.py --store ./store
	$(BIN)/python pipelines/verify.py --store ./store --sample 32
	$(BIN)/python pipelines/inspection.py --store ./store --html ./store/inspect.html

test: $(STAMP)  ## all but the slowest fault and soak tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) store build *.egg-info
