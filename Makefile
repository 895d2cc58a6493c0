# make demo: set up an environment and run the demo.   make test: set one up and run the tests.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint table clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -e ".[demo,test,bench]"
	touch $@

demo: $(VENV)/.installed
	$(RUN) recipes/Demo/mifuse/train.py hparams/demo.yaml

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest

table: $(VENV)/.installed
	$(RUN) benchmarks/open_transfer.py

clean:
	rm -rf $(VENV) results
