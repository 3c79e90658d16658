# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-heif lint format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lidit needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# Training is stopped on the way; the same command goes on. Each caption is drawn half the time.
TRAIN := $(BIN)/python trainer/train.py --store ./store --data.text_mix '{caption: 0.5, caption_original: 0.5}' --phases.0.steps 200

demo: $(STAMP)  ## 1,000 rendered scenes: captioned, embedded by two tiny LLMs, encoded, verified; a small LI-DiT trained on them
	$(BIN)/lidit demo --store ./store
	$(BIN)/python pipelines/embed.py --store ./store --text '[caption,caption_original]'
	$(BIN)/python pipelines/latents.py --store ./store
	$(BIN)/python pipelines/verify.py --store ./store --sample 32
	$(BIN)/python pipelines/inspection.py --store ./store --html ./store/inspect.html
	$(TRAIN) --stop_after_steps 80
	$(TRAIN)
	$(BIN)/python trainer/export.py --run ./runs/scenes --out ./weights --overwrite true
	$(BIN)/python -m demo.world.prompts --out ./generated/exam.jsonl --per_task 10
	$(BIN)/python pipelines/generate.py --weights ./weights --prompts ./generated/exam.jsonl --store ./generated \
		--out ./generated/pictures --sampler.guidance_scale 3.5 --overwrite
	$(BIN)/python pipelines/score.py --store ./generated
	$(BIN)/python -m demo.report --store ./store --run ./runs/scenes --samples ./generated --html ./demo.html \
		--makefile Makefile
	@echo 'demo: open demo.html; the table is in store/ (store/inspect.html), the training in runs/scenes, weights in weights/'

test: $(STAMP)  ## all but the slowest fault and soak tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m "not slow and not gpu" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/integration tests/faults -m "not slow and not gpu" --numprocesses 2 --dist loadfile --durations 25

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu"

HEIF := build/heif/bin/python
test-heif: $(STAMP)  ## HEIC, in an environment of its own: with the extra `heif` more files are pictures than without
	$(BIN)/python -m venv build/heif
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
		"$$($(HEIF) -c 'import site; print(site.getsitepackages()[0])')/lidit.pth"
	$(HEIF) -m pip install --quiet --constraint constraints.txt --no-deps pillow-heif
	$(HEIF) -m pytest tests/unit/lidit/images/test_heif.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) store runs weights generated demo.html build *.egg-info
