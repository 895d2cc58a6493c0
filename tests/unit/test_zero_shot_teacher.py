"""An audio-text model in the place of the API teacher."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_clap
import torch
from torch.nn import functional as F
from toy_corpora import write_wav

from speechbrain_mifuse.experiments import teacher
from speechbrain_mifuse.experiments.features import CorpusSettings
from speechbrain_mifuse.experiments.registry import repository_root
from speechbrain_mifuse.experiments.settings import load_hparams
from speechbrain_mifuse.experiments.teacher import AudioTextTeacher, ask_teacher, collect_answers, teacher_of
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.nnet.dual_encoder import DualEncoder
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.zero_shot.own_dual_encoder import export_dual_encoder, open_alm, toy_about
from speechbrain_mifuse.zero_shot.prompts import PromptSet
from speechbrain_mifuse.zero_shot.teacher import drawn_classes, teacher_samples

LABELS = ("angry", "sad")
PROMPTS = PromptSet("toy", ("I am {e}.", "{e}!", "Such a {e} voice."), {"angry": ("angry",), "sad": ("sad",)})


def settings(**changes):
    """A teacher of which nothing but the given is known."""
    return AudioTextTeacher(LABELS, lalm_samples=3, **changes)


class Model:
    """Hears angry on the first axis and sad on the second; its wordings differ a little."""

    name, classes_known, layer = "toy", None, 0

    def audio_vectors(self, frames, lengths):
        return F.normalize(frames.squeeze(1), dim=-1)

    def text_vectors(self, texts):
        points = [[float("angry" in text), float("sad" in text), 0.05 * len(text)] for text in texts]
        return F.normalize(torch.tensor(points), dim=-1)


@pytest.fixture
def store(tmp_path):
    """Eight utterances, the first half angry; all lean to angry."""
    store = FeatureStore(tmp_path, {"layers": [0], "dim": 3})
    with store.writer() as add:
        for place in range(8):
            frames = np.array([2.0 if place < 4 else 1.5, 0.5 if place < 4 else 1.0, 0.1 * place])
            add(f"t-{place}", frames.reshape(1, 1, 3), audio=f"{place:02d}", file=(1, 1))
    return store


def samples(store, keys=None, reference=None, model=None, seed=1):
    keys = [f"t-{place}" for place in range(8)] if keys is None else keys
    everyone = [f"t-{place}" for place in range(8)]
    return teacher_samples(model or Model(), store, keys, PROMPTS, LABELS, 5, seed, reference or everyone)


def test_samples_are_distributions_that_tell_the_classes_apart(store):
    found = samples(store)
    assert found.shape == (8, 5, 2) and torch.allclose(found.sum(-1), torch.ones(8, 5))
    assert found.mean(1).argmax(-1).tolist() == [0] * 4 + [1] * 4


def test_samples_differ_by_the_prompts_drawn_and_not_from_run_to_run(store):
    assert torch.equal(samples(store), samples(store))
    assert samples(store).std(1).max() > 1e-4
    assert not torch.equal(samples(store), samples(store, seed=2))


def test_an_utterances_samples_do_not_depend_on_what_else_is_asked_about(store):
    together, alone = samples(store), samples(store, keys=["t-3"])
    assert torch.allclose(together[3], alone[0], atol=1e-6)


def test_a_class_that_the_model_was_not_trained_on_is_refused(store):
    model = Model()
    model.classes_known = ("angry",)
    with pytest.raises(UserError, match="--teacher_alm: toy knows angry, not sad"):
        samples(store, model=model)


def test_prompts_are_drawn_with_replacement_and_averaged():
    drawn = drawn_classes({"sad": torch.eye(3)}, ["sad"], 200, torch.Generator().manual_seed(1))
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(200, 1))
    assert len({tuple(row) for row in (drawn[:, 0] > 0).int().tolist()}) > 3


def test_a_teacher_without_a_model_is_one_clear_error():
    with pytest.raises(UserError, match="--teacher_alm FOLDER"):
        settings().load("toy")


def test_there_is_nothing_to_collect_from_it():
    with pytest.raises(UserError, match="--teacher dual_encoder: it answers within the recipe itself"):
        collect_answers(settings(), {}, None, None)


def test_the_teacher_loads_on_the_runs_device_and_runs_its_code_only_if_allowed(monkeypatch):
    opened = []

    def opens(*given, **options):
        opened.append((given, options))
        return SimpleNamespace(trained_on=("emodb", "nemo"))

    monkeypatch.setattr(teacher, "open_alm", opens)
    clap = settings(teacher_alm="clap", teacher_alm_trust_remote_code=True)
    assert clap.load("ravdess", {"device": "cuda:1"}).trained_on
    options = {"trust_remote_code": True, "device": "cuda:1", "flag": "--teacher_alm"}
    assert opened == [(("clap",), options)]
    with pytest.raises(UserError, match="--teacher_alm: this model was trained with the labels of nemo"):
        clap.load("nemo", {"device": "cuda:1"})


@pytest.fixture(scope="module")
def clap_run(tmp_path_factory):
    """A tiny CLAP as teacher, and a target of four recordings."""
    folder = tmp_path_factory.mktemp("run")
    for split in ("adapt", "test"):
        rows = {}
        for number in range(2):
            path = folder / f"{split}{number}.wav"
            write_wav(path, 0.2 * np.sin(np.arange(16000) * (0.05 + 0.1 * number + 0.02 * len(split))))
            rows[f"{split}-{number}"] = {"wav": str(path), "speaker": split}
        atomic_write(folder / f"{split}_unlabelled.json", json.dumps(rows))
    atomic_write(folder / "corpus.json", json.dumps({"data_root": str(folder)}))
    alm, prompts = tiny_clap.build(folder / "small clap"), repository_root() / "hparams" / "prompts" / "english.yaml"
    return settings(teacher_alm=str(alm), teacher_prompts=prompts), CorpusSettings(
        "toy", folder, None, folder / "features"
    )


def test_answers_are_the_same_again_and_say_which_model_gave_them(clap_run):
    teacher, target = clap_run
    asks = [SimpleNamespace(answers_for=("adapt", "test"))]
    first, second = (ask_teacher(teacher, asks, target, None, None) for _ in range(2))
    assert first.samples.probs.shape == (4, 3, 2) and torch.equal(first.samples.probs, second.samples.probs)
    assert first.teacher == open_alm(teacher.teacher_alm).fingerprint() and json.dumps(first.teacher)
    assert ask_teacher(teacher, [SimpleNamespace(answers_for=())], target, None, None).teacher is None


def test_results_name_the_teacher_that_was_asked(clap_run, tmp_path):
    recipe = repository_root() / "hparams" / "nemo2rav.yaml"
    flags = ["--lalm_base_url", "https://host/v1", "--lalm_model", "m", "--output_folder", str(tmp_path / "out")]
    for name, shown in (("dual_encoder", "dual_encoder"), ("emodb", "m")):
        hparams, _ = load_hparams(recipe, [*flags, "--teacher", name])
        assert teacher_of(hparams).display_name == shown
    export_dual_encoder(tmp_path, DualEncoder(8, 6), toy_about())
    assert settings(teacher_alm=str(tmp_path)).display_name == "dual_encoder"
    assert settings(teacher_alm=clap_run[0].teacher_alm).display_name == "small-clap"
