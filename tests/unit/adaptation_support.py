"""A small world to adapt in: stored frames, an untrained source recogniser, and a language model's answers."""

from pathlib import Path

import recipe_files
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.method import Outputs, Survey
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

LABELS = ("angry", "happy", "neutral", "sad")
C = len(LABELS)
RECIPE = recipe_files.load("RAVDESS/mifuse/train.py")
YAML = Path(__file__).parents[2] / "hparams" / "base" / "adaptation.yaml"
UTTERANCES = {f"t-{n}": n % C for n in range(20)}
TEST = {f"t-{n}": n % C for n in range(20, 30)}


def distributions(*shape, sharpness=3.0):
    return (sharpness * torch.randn(*shape, C)).softmax(-1)


def some_survey(n=12, k=5, passes=16, hidden=6):
    """What is said of a set in which every third utterance is unanswered and the others lack some answers."""
    mask = torch.rand(n, k) < 0.7
    mask[:, 0] = True
    mask[::3] = False
    samples = distributions(n, k) * mask.unsqueeze(-1)
    classifier = distributions(n, passes)
    student = Outputs(torch.randn(n, 8), torch.rand(n, hidden), torch.randn(n, C), torch.nn.Linear(8, C))
    return Survey(samples, mask, lambda: classifier, rows=torch.arange(n), student=lambda: student)


def recipe(output_folder, **changes):
    """What `hparams/base/adaptation.yaml` gives a recipe."""
    with YAML.open() as file:
        base = {"seed": 1, "labels": list(LABELS), "output_folder": str(output_folder), "layer": 1}
        return load_hyperpyyaml(file, {**base, **changes})


def trained_methods():
    """Those of the table."""
    base = recipe("x")
    return [name for name in base["table"] if base["methods"][name].trains]


def make_world(filled_store, folder):
    """Call its `adapt`."""
    front = StoredFrames(filled_store({**UTTERANCES, **TEST}), layer=1)
    source = EmotionClassifier(front.dim, C, hidden_size=16)
    about = {"labels": LABELS, "features": front.store.fingerprint}
    export_recogniser(folder / "source", source, front, {"labels": LABELS, "encoder": "toy", "trim_db": 40.0}, about)
    samples = {key: (4 * F.one_hot(torch.tensor([c] * 3), C) + torch.randn(3, C)) for key, c in UTTERANCES.items()}
    samples |= {key: (4 * F.one_hot(torch.tensor([c] * 3), C)).float() for key, c in TEST.items()}
    return World(front, folder / "source", samples, folder)


class World:
    def __init__(self, front, source, samples, folder):
        self.front, self.source, self.folder = front, source, folder
        self.answers = {key: (logits.softmax(-1), torch.ones(3, dtype=torch.bool)) for key, logits in samples.items()}

    def datasets(self):
        made = {}
        for split, keys in (("adapt", UTTERANCES), ("test", TEST)):
            rows = {
                key: {"wav": "", **dict(zip(("lalm", "lalm_mask"), self.answers[key], strict=True))} for key in keys
            }
            dataset = DynamicItemDataset(rows)
            dataset.add_dynamic_item(self.front.read, takes=["id", "wav"], provides="feats")
            dataset.set_output_keys(["id", "feats", "lalm", "lalm_mask"])
            made[split] = dataset
        return made

    def hparams(self, out="out", **changes):
        quick = {"number_of_steps": 8, "batch_size": 8, "learning_rate": 0.01, "passes": 4}
        return recipe(self.folder / out, **{**quick, **changes})

    def adapt(self, name="mi_fuse", out="out", method=None, **changes):
        """Run a method of the YAML, or another one under its name."""
        hparams = self.hparams(out, **changes)
        if method is not None:
            hparams["methods"][name] = method
        return RECIPE.adapt(name, hparams, self.datasets(), self.front, self.source)

    def weights(self, name="mi_fuse", out="out"):
        return (self.folder / out / name / "student.safetensors").read_bytes()
