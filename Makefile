# make setup, once; then make check test before every commit.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python

.PHONY: setup check test demo

setup:  ## a virtual environment with everything, tools included
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements-dev.txt

check:  ## lint, format and types; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q

demo:  ## pictures of the test objects in outputs/
	$(PYTHON) inference_local.py
