"""An audio-text model in the place of the API teacher."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.pipeline import teacher_name, zero_shot_samples
from speechbrain_mifuse.zero_shot.prompts import PromptSet
from speechbrain_mifuse.zero_shot.teacher import drawn_classes, teacher_samples

LABELS = ("angry", "sad")
PROMPTS = PromptSet("toy", ("I am {e}.", "{e}!", "Such a {e} voice."), {"angry": ("angry",), "sad": ("sad",)})


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
        zero_shot_samples({"teacher_alm": None}, [])


def test_results_name_the_teacher_that_was_asked():
    hparams = {"teacher": "dual_encoder", "lalm_base_url": "https://host/v1", "lalm_model": "m"}
    assert teacher_name(hparams) == "dual_encoder"
    assert teacher_name({**hparams, "teacher": "emodb"}) == "m"
