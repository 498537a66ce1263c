# demo: set everything up and mount an image.  test: set everything up and run all tests.
VENV ?= .venv

.PHONY: demo test lint bench wheel clean

demo:
	scripts/setup .venv
	scripts/demo

test:
	scripts/setup $(VENV) test
	$(VENV)/bin/python -m pytest $(PYTEST)

lint:
	scripts/setup $(VENV) test,lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench:
	scripts/setup $(VENV)
	$(VENV)/bin/python benchmarks/run.py

wheel:
	scripts/setup $(VENV)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
