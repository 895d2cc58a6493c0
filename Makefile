# make demo: set up an environment and run the demo.   make test: set one up and run the tests.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Threads that wait for a busy core by sleeping: spinning makes a shared machine many times slower.
export OMP_WAIT_POLICY = passive
# The versions that the README's numbers were made with, for the project and for building it.
# `make demo LOCK=` takes the newest that the bounds of pyproject.toml allow instead.
LOCK ?= constraints.txt
ifneq ($(LOCK),)
export PIP_CONSTRAINT = $(LOCK)
export PIP_BUILD_CONSTRAINT = $(LOCK)
endif

.PHONY: demo test test_long lock newest table untrained ablations weighting other_seeds skew sentences norms sensitivity adapter zsfuse bench faults fuzz docs clean

$(VENV)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -e ".[demo,test,bench,docs]"
	touch $@

demo: $(VENV)/.installed
	$(RUN) recipes/Demo/mifuse/train.py hparams/demo.yaml

# The files of tests in the order of their names: those of the recipes, which take longest, come first.
test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Further forms of what the default tests hold: every pair and row, more processes, disks and sizes.
test_long: $(VENV)/.installed
	$(RUN) -m pytest -m long -n auto --maxprocesses 4

# Write constraints.txt anew: the newest versions within the bounds, for Python 3.10 to 3.12 in one file.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet "uv>=0.9,<1"
	$(VENV)-lock/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --upgrade \
		--no-annotate --custom-compile-command "make lock" --output-file constraints.txt

# The demo without the lock, in a fresh environment: whether the newest versions still work.
newest:
	$(MAKE) demo LOCK= VENV=$(VENV)-newest

# The open six transfers: the table, what each part gives, and what happens when classes are not of equal size.
PAIRS = emodb2rav nemo2rav rav2nemo emodb2nemo rav2emodb nemo2emodb
SWEEP = $(VENV)/bin/speechbrain-mifuse sweep $(PAIRS) --table docs/results
ABLATIONS = lalm_sfuda,mi_fuse,mi_fuse_reciprocal,mi_fuse_tau_1,mi_fuse_product,mi_fuse_product_prior
ABLATIONS := $(ABLATIONS),mi_fuse_plus_no_prior,mi_fuse_plus_once,mi_fuse_plus_equal_shares
ABLATIONS := $(ABLATIONS),mi_fuse_plus_random_folds,mi_fuse_plus_temperature_2
SKEWED = --seeds 1-2 --methods source_only,lalm_sfuda,mi_fuse,mi_fuse_product_prior,mi_fuse_plus_equal_shares,mi_fuse_plus
RIVALS = source_only,source_adabn,zero_training,mi_fuse
UNTRAINED = source_only,source_adabn,source_adabn_prior,tent,t3a,lame,lalm_zero_shot,lalm_zero_shot_prior
UNTRAINED := $(UNTRAINED),zero_training,zero_training_adabn,g_no_api,g_once,g_closed_form_permuted
UNTRAINED := $(UNTRAINED),g_closed_form_adapt,g_closed_form,oracle_lda
WEIGHTS = source_only,lalm_sfuda,mean_fusion,mi_fuse_permuted,mi_fuse
OTHERS = source_only,lalm_sfuda,mi_fuse,mi_fuse_reciprocal,mi_fuse_plus,mi_fuse_plus_equal_shares,oracle
NORMED = --methods source_only,lalm_sfuda,mean_fusion,mi_fuse,mi_fuse_plus,oracle --baselines mi_fuse
SAID = --seeds 1-2 --methods source_only,source_adabn,zero_training_adabn,g_no_api,g_closed_form,oracle_lda
SAID := $(SAID) --baselines source_adabn,zero_training_adabn
LESS = --prepare_target "{keep: {$(1): 0.2, $(2): 0.2}}"

table: $(VENV)/.installed
	$(SWEEP) --seeds 1-5 --name open_transfer --baselines $(RIVALS)

# The rows that train no student: minutes for all of them.
untrained: $(VENV)/.installed
	$(SWEEP) --seeds 1-5 --name untrained --output results/open_transfer --methods $(UNTRAINED) \
		--baselines source_only,source_adabn,zero_training

ablations: $(VENV)/.installed
	$(SWEEP) --seeds 1-3 --name ablations --output results/open_transfer --methods $(ABLATIONS),mi_fuse_plus \
		--baselines mi_fuse,mi_fuse_plus

# What the weights by mutual information are worth, against the same weights dealt to other utterances.
weighting: $(VENV)/.installed
	$(SWEEP) --seeds 1-5 --name weighting --output results/open_transfer --methods $(WEIGHTS) \
		--baselines lalm_sfuda,mi_fuse_permuted

# Whether what the ablations suggest holds with seeds that took no part in them.
other_seeds: $(VENV)/.installed
	$(SWEEP) --seeds 11-13 --name other_seeds --methods $(OTHERS) --baselines lalm_sfuda,mi_fuse

skew: $(VENV)/.installed
	$(SWEEP) $(SKEWED) --name skew_happy_neutral --baselines mi_fuse -- $(call LESS,happy,neutral)
	$(SWEEP) $(SKEWED) --name skew_angry_sad --baselines mi_fuse -- $(call LESS,angry,sad)

# What it is worth that the test sentences occur in the adaptation set, in other voices.
sentences: $(VENV)/.installed
	$(SWEEP) $(SAID) --name sentences_apart -- --prepare_target "{sentences: apart}"
	$(SWEEP) $(SAID) --name sentences_same -- --prepare_target "{sentences: same}"

# Simulated worlds on what `make table` trained: skewed classes and natural targets, for methods that train nothing.
worlds: $(VENV)/.installed
	$(RUN) benchmarks/worlds.py run results/open_transfer --seeds 1-5

norms: $(VENV)/.installed
	$(SWEEP) $(NORMED) --seeds 1-2 --name speaker_norm_known -- --speaker_norm=known
	$(SWEEP) $(NORMED) --seeds 1 --name speaker_norm_clustered -- --speaker_norm=clustered

sensitivity: $(VENV)/.installed
	$(RUN) benchmarks/sensitivity.py --seeds 1

# The adapter and ZS-Fuse on the open corpora: folds, seeds and arms of each, then one table.
define compare
	$(RUN) recipes/RAVDESS/$(1)/train.py hparams/$(1)_ravdess.yaml
	$(RUN) recipes/nEMO/$(1)/train.py hparams/$(1)_nemo.yaml
	$(RUN) recipes/EmoDB/$(1)/train.py hparams/$(1)_emodb.yaml
	$(RUN) benchmarks/arm_table.py $(1) results/$(1)_ravdess results/$(1)_nemo results/$(1)_emodb
endef

adapter: $(VENV)/.installed
	$(call compare,adapter)

zsfuse: $(VENV)/.installed
	$(call compare,zsfuse)

BENCHMARKS = recipe_form extraction million epoch mifuse_step closed_form memory adapter zero_shot recognise collect collect_faults label_store serve

bench: $(VENV)/.installed
	for name in $(BENCHMARKS); do $(RUN) benchmarks/run.py $$name --json docs/results/speed/$$name.json; done

# The suites of faults in full; short forms of them are among the tests.
faults: $(VENV)/.installed
	$(RUN) benchmarks/run.py faults --json docs/results/reliability.json

fuzz: $(VENV)/.installed
	$(RUN) tests/answer_fuzz.py --cases 1000000
	$(RUN) tests/folder_fuzz.py --cases 10000
	$(RUN) tests/http_fuzz.py --cases 10000

# The documentation site, in site/.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-lock $(VENV)-newest results site
