# make setup, once; then make check test before every commit.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python

.PHONY: setup check test faults hostile bench demo

setup:  ## a virtual environment with everything, tools included
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements-dev.txt

check:  ## lint, format and types; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q

faults:  ## kills of training runs at random points, 20 of each kind; figures in runs/faults
	$(PYTHON) -m tests.faults.long --kills 20 --output runs/faults/report.json

hostile:  ## every bad input, then fuzzing: hypothesis with many examples, atheris for a minute a reader
	HOSTILE_EXAMPLES=2000 $(PYTHON) -m pytest -q -s tests/hostile
	for reader in image mask boxes "grabcut boxes" index settings prompts DreamBench captions concept embeddings checkpoint shard "shard index"; do \
		$(PYTHON) -m tests.hostile.guided "$$reader" 60 || exit 1; done

bench:  ## docs/BENCHMARKS.md anew, at full size: hours on a CPU; the GPU part where there is one
	$(PYTHON) -m benchmarks.generation --size full --rounds 5 --threads 2 --batch_sizes 1 --resolutions 256 --memory_rounds 0
	$(PYTHON) -m benchmarks.generation --size full --rounds 3 --threads 2 --batch_sizes 4 --memory_rounds 0 --output benchmarks/results/generation_batch_4.json
	$(PYTHON) -m benchmarks.generation --size full --rounds 3 --threads 2 --batch_sizes --resolutions 768 --memory_rounds 0 --output benchmarks/results/generation_768.json
	$(PYTHON) -m benchmarks.generation --size full --rounds 3 --threads 1 --batch_sizes 1 --memory_rounds 3 --output benchmarks/results/generation_1_thread.json
	$(PYTHON) -m benchmarks.ladder --size full --rounds 3 --threads 2
	$(PYTHON) -m benchmarks.hardware --size full --rounds 3 --threads 2 --dtypes fp32 bf16 --batch_sizes 1 4
	$(PYTHON) -m benchmarks.encoding --size full --rounds 15
	$(PYTHON) -m benchmarks.training --size full --rounds 3 --batch_size 1 --stages global
	$(PYTHON) -m benchmarks.training --size full --rounds 3 --batch_size 1 --stages local --output benchmarks/results/training_stage_2.json
	$(PYTHON) -m benchmarks.training --size full --rounds 1 --batch_size 4 --stages global --cases "+ bf16, frozen in bf16" "+ bf16, checkpointing" --output benchmarks/results/training_batch_4.json
	$(PYTHON) -m benchmarks.loader --size full --rounds 5 --count 32 --index_rows 1000 10000 100000 1000000 --workers 0 1 2 --shard_rows 10000000
	$(PYTHON) -m benchmarks.folder --size full --rounds 3 --num_images 4 --batch_sizes 1 2 4 8 16 --processes 1 2
	-$(PYTHON) -m benchmarks.gpu_check --size full
	-$(PYTHON) -m benchmarks.gpu --size full --rounds 7
	$(PYTHON) -m benchmarks.table

demo:  ## pictures of the test objects in outputs/
	$(PYTHON) inference_local.py
