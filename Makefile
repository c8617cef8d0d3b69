# make setup, once; then make check test before every commit.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python

.PHONY: setup check test bench demo hostile

setup:  ## a virtual environment with everything, tools included
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements-dev.txt

check:  ## lint, format and types; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q

hostile:  ## every bad input, then fuzzing: hypothesis with many examples, atheris for a minute a reader
	ELITE_HOSTILE=1 HOSTILE_EXAMPLES=2000 $(PYTHON) -m pytest -q -s tests/hostile
	for reader in image mask boxes index settings prompts DreamBench concept checkpoint; do \
		$(PYTHON) -m tests.hostile.guided $$reader 60 || exit 1; done

bench:  ## BENCHMARKS.md anew, at full size: hours on a CPU; the GPU part where there is one
	$(PYTHON) -m benchmarks.generation --size full --rounds 5 --batch_sizes 1 2 4 --resolutions 256 512 768 --memory_rounds 3
	$(PYTHON) -m benchmarks.encoding --size full --rounds 15
	$(PYTHON) -m benchmarks.training --size full --rounds 3 --batch_size 1
	$(PYTHON) -m benchmarks.loader --size full --rounds 5 --count 32 --index_rows 1000 10000 100000 1000000 --workers 0 1 2
	$(PYTHON) -m benchmarks.folder --size full --rounds 5 --processes 1 2
	-$(PYTHON) -m benchmarks.gpu --size full --rounds 7
	$(PYTHON) -m benchmarks.table

demo:  ## pictures of the test objects in outputs/
	$(PYTHON) inference_local.py
