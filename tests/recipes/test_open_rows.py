"""Registry rows of the open corpora that no other file runs: each as its row says, on toy corpora."""

import csv
import os
import shlex
from pathlib import Path

import processes
import pytest

from speechbrain_mifuse.demo import synthetic

ROOT = Path(__file__).parents[2]
ROWS = {
    row["Hparam_file"]: row
    for path in Path(__file__).parent.glob("*.csv")
    for row in csv.DictReader(path.open(newline=""))
}
PAIRS = ("emodb2rav", "rav2nemo", "emodb2nemo", "rav2emodb", "nemo2emodb")
QUICK = "{number_of_epochs: 4, batch_size: 12, learning_rate: 0.01}"
PAIR_FLAGS = {"layer": 0, "teacher_layer": 1, "source_classifier": QUICK, "teacher_classifier": QUICK}
CLASSIFIERS = ("classifier_ravdess", "classifier_nemo")
SHORT = ("demo", "classifier_ravdess")
OWN_FLAGS = {**{name: PAIR_FLAGS for name in ("demo", *PAIRS)}, **{name: {"layer": 1} for name in CLASSIFIERS}}


def run_with_one_take(*arguments):
    """As `run_script`, with one take of each sentence of the synthetic corpora: rendering all of them takes long."""
    every = synthetic.list_clips
    synthetic.list_clips = lambda domain: every(domain)[:: synthetic.TAKES]
    processes.run_script(*arguments)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in OWN_FLAGS]
)
def test_a_row_runs_as_it_says(name, toy_folder, toy_encoder, tmp_path_factory, tmp_path):
    row = ROWS[f"hparams/{name}.yaml"]
    flags = {"encoder": toy_encoder, "encoder_layers": "[0, 1]", "device": "cpu", "output_folder": tmp_path / "out"}
    flags |= OWN_FLAGS[name]
    if name != "demo":  # it renders its own corpora
        flags["data_folder"] = toy_folder
    words = [*shlex.split(row["test_debug_flags"]), *(f"--{key}={value}" for key, value in flags.items())]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
    cache = tmp_path_factory.getbasetemp() / "cache_of_rows"
    environment = {**kept, "MIFUSE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    arguments = (row["Script_file"], [row["Hparam_file"], *words], str(ROOT), environment, str(tmp_path / "log"))
    process = processes.start(run_with_one_take, *arguments)
    process.join(300)
    assert process.exitcode == 0, "".join((tmp_path / f"log.{end}").read_text() for end in ("out", "err"))
    wanted = row["test_debug_checks"].removeprefix("file_exists=[").removesuffix("]").split(",")
    assert wanted and not [path for path in wanted if not (tmp_path / "out" / path).exists()]
