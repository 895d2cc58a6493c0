# make demo: set up an environment and run the demo.   make test: set one up and run the tests.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Threads that wait for a busy core by sleeping: spinning makes a shared machine many times slower.
export OMP_WAIT_POLICY = passive

.PHONY: demo test table bench clean

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

bench: $(VENV)/.installed
	for name in epoch mifuse_step memory; do $(RUN) benchmarks/run.py $$name --json docs/results/speed/$$name.json; done

clean:
	rm -rf $(VENV) results
