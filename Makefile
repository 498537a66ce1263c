# demo: set everything up and mount an image.  test: set everything up and run all tests.
# quick: what to run after each change.  fmt: put the code into its form.
# bench-compare BASE=COMMIT: is this tree slower than that commit?
# coverage: which lines the tests of the library and the command run.  docs: build/docs/index.html.
VENV ?= .venv

# What `make quick` leaves out of tests/unit: reading every image through the asynchronous API, which
# takes a quarter of that directory's time.  With it, make quick takes more than a minute.
SLOW = --ignore=tests/unit/test_aio.py

.PHONY: demo test quick lint fmt coverage docs bench bench-compare wheel clean

demo:
	scripts/setup .venv
	scripts/demo

test:
	scripts/setup $(VENV) test
	$(VENV)/bin/python -m pytest $(PYTEST)

quick: lint
	$(VENV)/bin/python -m pytest -q tests/unit $(SLOW)

lint:
	scripts/setup $(VENV) test,lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fmt:
	scripts/setup $(VENV) test,lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

coverage:
	scripts/setup $(VENV) test,coverage
	$(VENV)/bin/python -m coverage run -m pytest -q tests/unit tests/cli
	$(VENV)/bin/python -m coverage report

docs:
	scripts/setup $(VENV) docs
	$(VENV)/bin/python scripts/docs

bench:
	scripts/setup $(VENV)
	$(VENV)/bin/python benchmarks/run.py

bench-compare:
	scripts/setup $(VENV)
	$(VENV)/bin/python benchmarks/compare.py $(BASE) $(COMPARE)

wheel:
	scripts/setup $(VENV)
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
