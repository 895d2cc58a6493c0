"""Speaker normalisation: the arithmetic, who it leaves alone, what it never mixes, recipes that say what they did."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse.corpora.folder import prepare_folder
from speechbrain_mifuse.evaluation.aggregate import Comparison, protocol
from speechbrain_mifuse.evaluation.scoring import evaluate, side_by_side
from speechbrain_mifuse.experiments import features, preflight, run_report
from speechbrain_mifuse.experiments.registry import repository_root
from speechbrain_mifuse.experiments.settings import load_hparams
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.speakers import (
    FoundSpeakers,
    KnownSpeakers,
    chosen_norm,
    cluster,
    frame_statistics,
    shrunken_offsets,
    speaker_offsets,
    speaker_vectors,
)
from speechbrain_mifuse.features.store import FeatureStore, StoreError
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import RecogniserError, load_classifier, recogniser_digest
from speechbrain_mifuse.report.result_files import write_results
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

ROOT = Path(__file__).parents[2]
OPTIONS = {"speaker_norm_strength": 10, "speaker_embedding": "frames", "speaker_clusters": None}
# Means of the utterances 1, 3 | 8 | 4 and of layer 2 ten times that: of speaker a 2, of b 8, of all 4.
FRAMES = {"t-1": [0.0, 2.0], "t-2": [3.0, 3.0, 3.0], "t-3": [8.0], "t-4": [4.0]}
SPEAKERS = {"t-1": "a", "t-2": "a", "t-3": "b", "t-4": None}


def make_store(folder, frames):
    """A store of two layers of dimension 1; the second is ten times the first."""
    store = FeatureStore(folder, {"encoder": "toy", "layers": [1, 2], "dim": 1})
    with store.writer() as add:
        for key, values in frames.items():
            add(key, np.array([values, [10 * value for value in values]])[..., None], audio=key, file=(1, 1))
    return store


def write_split(folder, split, speakers):
    """A manifest without labels; `None` stands for a speaker who is not known."""
    rows = {key: {"wav": f"{key}.wav", "speaker": who or f"{key}.wav"} for key, who in speakers.items()}
    for key in [key for key, who in speakers.items() if who is None]:
        rows[key]["speaker_known"] = False
    atomic_write(folder / "corpus.json", '{"data_root": "/toy"}')
    atomic_write(folder / f"{split}_unlabelled.json", json.dumps(rows))
    return folder / f"{split}_unlabelled.json"


@pytest.fixture
def toy(tmp_path):
    """Store and manifest of `FRAMES`."""
    return make_store(tmp_path / "store", FRAMES), write_split(tmp_path, "adapt", SPEAKERS)


def offsets_of(store, manifest, norm):
    """Offsets of layer 1 by utterance id."""
    return {key: offset[0].item() for key, offset in speaker_offsets([manifest], store, norm).offsets.items()}


# The arithmetic.


def test_an_offset_is_the_shrunken_distance_of_the_speakers_mean_from_that_of_all(toy):
    found = offsets_of(*toy, KnownSpeakers(2.0))
    assert found == pytest.approx({"t-1": 2 / 4 * -2, "t-2": 2 / 4 * -2, "t-3": 1 / 3 * 4, "t-4": 0})


def test_every_layer_has_its_own_offset_and_frames_lose_just_that(toy):
    offsets = speaker_offsets([toy[1]], toy[0], KnownSpeakers(2.0))
    assert StoredFrames(toy[0], 1, offsets).read("t-1", "").flatten().tolist() == [1.0, 3.0]
    assert StoredFrames(toy[0], 2, offsets).read("t-1", "").flatten().tolist() == [10.0, 30.0]
    both = StoredFrames(toy[0], None, offsets).read("t-1", "")
    assert both.dtype == torch.half and both.squeeze(-1).tolist() == [[1.0, 10.0], [3.0, 30.0]]
    assert StoredFrames(toy[0], 1).read("t-1", "").flatten().tolist() == [0.0, 2.0]


def test_strength_zero_centres_every_speaker_and_a_huge_one_none(toy):
    assert offsets_of(*toy, KnownSpeakers(0.0)) == pytest.approx({"t-1": -2, "t-2": -2, "t-3": 4, "t-4": 0})
    assert max(map(abs, offsets_of(*toy, KnownSpeakers(1e12)).values())) < 1e-9


def test_who_is_heard_more_often_is_shrunk_less():
    counts = torch.tensor([0, 1, 5, 50])
    found = shrunken_offsets(counts[:, None] * torch.tensor([[0.0], [9.0], [9.0], [0.0]]), counts, 10.0)
    once, five_times = found[1:3, 0].tolist()
    assert five_times / once == pytest.approx((5 / 15) / (1 / 11))


def test_a_corpus_of_one_speaker_stays_as_it_is(tmp_path):
    store = make_store(tmp_path / "store", FRAMES)
    manifest = write_split(tmp_path, "adapt", dict.fromkeys(FRAMES, "a"))
    assert offsets_of(store, manifest, KnownSpeakers(0.0)) == pytest.approx(dict.fromkeys(FRAMES, 0.0))


def test_recordings_without_a_known_speaker_keep_their_frames_and_the_log_counts_them(toy, caplog):
    front = StoredFrames(toy[0], 1, speaker_offsets([toy[1]], toy[0], KnownSpeakers(0.0)))
    assert front.read("t-4", "").equal(StoredFrames(toy[0], 1).read("t-4", ""))
    assert "1 recordings without a known speaker keep their frames" in caplog.text


def test_a_split_of_unknown_speakers_alone_keeps_all_its_frames(tmp_path):
    store = make_store(tmp_path / "store", FRAMES)
    manifest = write_split(tmp_path, "adapt", dict.fromkeys(FRAMES))
    assert offsets_of(store, manifest, KnownSpeakers(0.0)) == dict.fromkeys(FRAMES, 0.0)


# What it reads and what it never mixes.


def test_the_test_set_has_no_part_in_the_offsets_of_the_adaptation_set_nor_the_other_way_round(tmp_path):
    frames = {**FRAMES, "t-5": [100.0], "t-6": [104.0]}
    store = make_store(tmp_path / "store", frames)
    adapt, test = write_split(tmp_path, "adapt", SPEAKERS), write_split(tmp_path, "test", {"t-5": "c", "t-6": "d"})
    together = speaker_offsets([adapt, test], store, KnownSpeakers(0.0)).offsets
    assert {key: together[key][0].item() for key in FRAMES} == offsets_of(store, adapt, KnownSpeakers(0.0))
    assert (together["t-5"][0].item(), together["t-6"][0].item()) == (-2.0, 2.0)


def test_a_name_in_two_splits_is_two_speakers(tmp_path):
    store = make_store(tmp_path / "store", {"t-1": [0.0], "t-2": [2.0], "t-3": [7.0], "t-4": [9.0]})
    adapt = write_split(tmp_path, "adapt", {"t-1": "a", "t-2": "b"})
    test = write_split(tmp_path, "test", {"t-3": "a", "t-4": "b"})
    found = speaker_offsets([adapt, test], store, KnownSpeakers(0.0)).offsets
    assert [found[f"t-{n}"][0].item() for n in (1, 2, 3, 4)] == [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("name", ["known", "clustered"])
def test_no_manifest_with_labels_is_opened(name, toy, tmp_path, monkeypatch):
    atomic_write(tmp_path / "adapt.json", "no manifest at all")
    monkeypatch.setattr(features, "store_frames", lambda *arguments: toy[0])
    norm = chosen_norm({**OPTIONS, "speaker_norm": name})
    target = features.CorpusSettings("toy", tmp_path, None, None, norm=norm)
    assert set(features.open_frame_source(target, 1, None).offsets.offsets) == set(FRAMES)


def test_the_api_teachers_frames_are_left_alone(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "store_frames", lambda *arguments: toy[0])
    flags = ["--data_folder", str(tmp_path), "--speaker_norm", "known", "--teacher_manifests", str(tmp_path)]
    hparams, _ = load_hparams(repository_root() / "hparams" / "nemo2rav.yaml", flags)
    assert features.CorpusSettings.target_of(hparams).norm is not None
    teacher = features.CorpusSettings.teacher_of(hparams)
    assert features.open_frame_source(teacher, 1, None).offsets is None


def test_an_utterance_that_lacks_frames_is_passed_over_and_one_of_another_manifest_refused(toy, tmp_path):
    manifest = write_split(tmp_path, "test", {"t-1": "a", "t-9": "a"})
    offsets = speaker_offsets([manifest], toy[0], KnownSpeakers(0.0))
    assert list(offsets.offsets) == ["t-1"]
    with pytest.raises(StoreError, match="'t-3' is in none of the manifests"):
        StoredFrames(toy[0], 1, offsets).read("t-3", "")


# Kept results.


def test_offsets_are_computed_once(toy, monkeypatch):
    first = offsets_of(*toy, KnownSpeakers(2.0))
    monkeypatch.setattr(FeatureStore, "frames", None)
    assert offsets_of(*toy, KnownSpeakers(2.0)) == first


def test_a_damaged_file_of_offsets_is_computed_anew(toy, caplog):
    first = offsets_of(*toy, KnownSpeakers(2.0))
    (path,) = (toy[0].folder / "speakers").iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert offsets_of(*toy, KnownSpeakers(2.0)) == first and "damaged" in caplog.text


def test_the_fingerprint_tells_how_and_of_whom_and_without_normalisation_it_is_the_stores(toy, tmp_path):
    store, manifest = toy

    def fingerprint(norm, path=manifest):
        return StoredFrames(store, 1, speaker_offsets([path], store, norm)).fingerprint

    assert StoredFrames(store, 1).fingerprint == store.fingerprint
    norms = (
        KnownSpeakers(2.0),
        KnownSpeakers(3.0),
        FoundSpeakers(2.0, "frames", None),
        FoundSpeakers(2.0, "frames", 3),
    )
    found = [fingerprint(norm) for norm in norms]
    assert len({json.dumps(about) for about in [*found, store.fingerprint]}) == 5
    assert found[0] == json.loads(json.dumps(found[0])) == fingerprint(KnownSpeakers(2.0))
    other = fingerprint(KnownSpeakers(2.0), write_split(tmp_path, "test", {**SPEAKERS, "t-1": "b"}))
    assert other["speaker_norm"] == found[0]["speaker_norm"] and other["speaker_offsets"] != found[0]["speaker_offsets"]


# Clusters.


@pytest.fixture
def planted(tmp_path):
    """Eighteen utterances of three voices, each far from the others and with two ways of speaking."""
    rng = np.random.default_rng(0)
    voices = rng.normal(0, 5, (3, 1, 8))
    store = FeatureStore(tmp_path / "store", {"encoder": "toy", "layers": [1], "dim": 8})
    with store.writer() as add:
        for n in range(18):
            add(f"t-{n}", voices[n % 3] + rng.normal(0, 1, (1, 6, 8)) + n // 3 % 2, audio=str(n), file=(1, 1))
    return store, {f"t-{n}": str(n % 3) for n in range(18)}


def test_planted_voices_are_found_and_normalised_as_if_they_were_known(planted, tmp_path):
    store, speakers = planted
    manifest = write_split(tmp_path, "adapt", speakers)
    rows = {key: {} for key in speakers}
    found = FoundSpeakers(1.0, "frames", None).speakers(rows, store)
    assert len(set(found)) == len(set(zip(found, speakers.values(), strict=True))) == 3
    clustered, known = (
        speaker_offsets([manifest], store, norm).offsets
        for norm in (FoundSpeakers(1.0, "frames", None), KnownSpeakers(1.0))
    )
    assert all(clustered[key].equal(known[key]) for key in speakers)


def test_clusters_do_not_need_names(planted, tmp_path):
    store, speakers = planted
    manifest = write_split(tmp_path, "adapt", dict.fromkeys(speakers))
    offsets = speaker_offsets([manifest], store, FoundSpeakers(0.0, "frames", 3)).offsets
    means = torch.stack([StoredFrames(store, 1).read(key, "").float().mean(0) - offsets[key][0] for key in speakers])
    groups = torch.stack([means[voice::3].mean(0) for voice in range(3)])
    assert groups.allclose(means.mean(0).expand(3, -1), atol=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("distinct", "k"), [(5, 1), (5, 5), (1, 3)])
def test_any_number_of_clusters_can_be_asked_for(distinct, k):
    found = cluster(np.arange(distinct * 4.0).reshape(-1, 2)[np.arange(10) % distinct], k)
    assert found.shape == (10,) and len(set(found.tolist())) == min(distinct, k)


def test_a_dimension_that_never_changes_does_no_harm_to_the_statistics(planted):
    assert np.isfinite(frame_statistics({"t-0": {}}, planted[0])).all()


SPEAKER_MODEL = """
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 10
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 10
    channels: [8, 8, 8, 8, 24]
    attention_channels: 4
    se_channels: 4
    lin_neurons: 6
classifier: !new:torch.nn.Linear {in_features: 6, out_features: 2}
modules: {compute_features: !ref <compute_features>, mean_var_norm: !ref <mean_var_norm>,
    embedding_model: !ref <embedding_model>, classifier: !ref <classifier>}
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
"""


def test_a_speaker_model_of_speechbrain_can_be_named_in_the_place_of_frames(tmp_path):
    atomic_write(tmp_path / "ecapa" / "hyperparams.yaml", SPEAKER_MODEL)
    rows = {f"t-{n}": {"wav": write_wav(tmp_path / f"{n}.wav", utterance("sad", n, 1))} for n in range(3)}
    vectors = speaker_vectors(str(tmp_path / "ecapa"), rows, None)
    assert vectors.shape == (3, 6) and np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    assert len(FoundSpeakers(1.0, str(tmp_path / "ecapa"), 2).speakers(rows, None)) == 3


# What is asked for.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"speaker_norm": "mine"}, "--speaker_norm: 'mine' is none of none, known, clustered"),
        ({"speaker_norm_strength": -1}, "--speaker_norm_strength: -1"),
        ({"speaker_norm_strength": "much"}, "--speaker_norm_strength: much"),
        ({"speaker_clusters": 0}, "--speaker_clusters: 0"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_flag(wrong, said):
    with pytest.raises(UserError, match=said):
        chosen_norm({**OPTIONS, "speaker_norm": "known", **wrong})


def test_an_encoder_that_is_trained_along_has_no_frames_to_normalise():
    with pytest.raises(UserError, match=r"--speaker_norm known.*--features stored"):
        features.finetuned_frame_source("x", None, chosen_norm({**OPTIONS, "speaker_norm": "known"}))


# Speakers that are not known: what is said of them.


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    """Manifests of labelled recordings of which half have no speaker."""
    folder = tmp_path_factory.mktemp("nameless")
    rows = ["file,emo,speaker"]
    for number in range(16):
        write_wav(folder / "mine" / f"{number}.wav", utterance(LABELS[number % 4], number, 1))
        rows.append(f"{number}.wav,{LABELS[number % 4]},{'' if number < 8 else f'p{number % 4}'}")
    (folder / "mine" / "labels.csv").write_text("\n".join(rows))
    prepare_folder(folder / "mine", folder / "manifests", {"adapt": 0.5, "test": 0.5})
    return folder / "manifests"


def test_the_protocol_tells_how_far_speakers_are_known(nameless):
    told = run_report.protocol(LABELS, nameless)
    assert told.startswith("speaker-independent as far as speakers are known, 4 classes, ")
    assert "2 speakers to adapt, 2 others to test, 8 of 16 recordings without a known speaker" in told
    assert "transductive" not in told
    told = run_report.protocol(LABELS, nameless, KnownSpeakers(10.0))
    assert "; speaker_norm known (" in told and "n / (n + 10)" in told and "transductive" in told


def test_an_interval_over_recordings_does_not_pass_for_one_over_speakers(tmp_path):
    rows = {f"t-{n}": {"wav": "a", "speaker": str(n), "speaker_known": False, "emo": "sad"} for n in range(6)}
    atomic_write(tmp_path / "corpus.json", '{"data_root": "/toy"}')
    about = {"source": "a", "target": "b", "teacher": "c", "seed": 1, "encoder": "toy", "protocol": "toy", "n_train": 9}
    about |= {"selection": "last", "speaker_norm": "none", "steps": 5, "diversity_weight": 1, "temperature": 1}
    for known, said in ((0, "over 6 recordings without"), (2, "over the 2 test speakers and 4 recordings without")):
        for key in list(rows)[:known]:
            rows[key].pop("speaker_known")
        atomic_write(tmp_path / "test.json", json.dumps(rows))
        scored = evaluate({"t-0": [0.1, 0.9]}, tmp_path / "test.json", ["angry", "sad"])
        assert (scored["test_speakers"], scored["test_recordings_without_speaker"]) == (known, 6 - known)
        record = write_results(tmp_path / "shot", scored, ["angry", "sad"], method="shot", **about)
        assert said in side_by_side(tmp_path, ["shot"])
        told = protocol(Comparison([record], ["shot"]))
        assert f"{6 - known} recordings without a known speaker" in told and "as far as speakers are known" in told


# The recipe.

METHODS = ["source_only", "mi_fuse"]
QUICK = "{number_of_epochs: 4, batch_size: 12, learning_rate: 0.01}"


class Recipe:
    """Runs the recipe on the toy corpora; all runs share the teacher and its answers."""

    def __init__(self, folder, data_folder, encoder):
        self.folder, self.data_folder, self.encoder = folder, data_folder, encoder

    def __call__(self, name, output=None, methods=METHODS, **changes):
        """Run with a normalisation; gives exit status, output folder, and what was said."""
        flags = {"data_folder": self.data_folder, "output_folder": self.folder / (output or name)}
        flags |= {"method": f"[{', '.join(methods)}]", "encoder": self.encoder, "encoder_layers": "[0, 1]", "layer": 0}
        flags |= {"teacher_layer": 1, "source_classifier": QUICK, "teacher_classifier": QUICK, "batch_size": 12}
        flags |= {"number_of_steps": 6, "learning_rate": 0.003, "passes": 4, "lalm_samples": 2, "speaker_norm": name}
        flags |= {"label_store": self.folder / "labels.sqlite", "teacher_folder": self.folder / "teacher", **changes}
        words = ["hparams/nemo2rav.yaml", *(t for key, value in flags.items() for t in (f"--{key}", str(value)))]
        environment = {**os.environ, **processes.ONE_THREAD, "MIFUSE_CACHE": str(self.folder / "cache")}
        log = f"{flags['output_folder']}.log"
        arguments = ("recipes/RAVDESS/mifuse/train.py", words, str(ROOT), environment, log)
        process = processes.start(processes.run_script, *arguments)
        process.join(120)
        said = Path(f"{log}.out").read_text() + Path(f"{log}.err").read_text()
        return process.exitcode, flags["output_folder"], said


@pytest.fixture(scope="module")
def recipe(toy_folder, toy_encoder, tmp_path_factory):
    return Recipe(tmp_path_factory.mktemp("norm"), toy_folder, toy_encoder)


@pytest.fixture(scope="module")
def runs(recipe):
    """Output folder and what was said, by normalisation."""
    found = {}
    for name in ("none", "known", "clustered"):
        status, folder, said = recipe(name)
        assert status == 0, said
        found[name] = folder, said
    return found


def read(folder, *parts):
    return json.loads(folder.joinpath(*parts).read_text())


@pytest.mark.parametrize("name", ["known", "clustered"])
def test_a_normalised_run_says_so_in_results_and_table_for_every_method(name, runs):
    folder, _ = runs[name]
    for method in METHODS:
        found = read(folder, method, "results.json")
        assert found["speaker_norm"].startswith(f"{name} (") and found["speaker_norm"] in found["protocol"]
        assert "transductive" in found["protocol"] and found["protocol"] in (folder / "results.md").read_text()
    assert found["speaker_norm"] in protocol(Comparison([found], [found["method"]]))


def test_a_run_without_it_says_none_and_nothing_of_speakers_is_stored_for_it(runs):
    found = read(runs["none"][0], "mi_fuse", "results.json")
    assert found["speaker_norm"] == "none" and "speaker_norm" not in found["protocol"]
    assert "speaker_norm" not in (runs["none"][0] / "source" / "recogniser" / "hyperparams.yaml").read_text()


def test_source_and_predictions_change_with_it_and_the_teacher_and_its_answers_do_not(runs, recipe):
    folders = [folder for folder, _ in runs.values()]
    assert len({recogniser_digest(folder / "source" / "recogniser") for folder in folders}) == 3
    assert len({(folder / "mi_fuse" / "predictions.json").read_bytes() for folder in folders}) == 3
    assert "speaker_norm" not in (recipe.folder / "teacher" / "settings.json").read_text()
    assert all("nothing is asked" in runs[name][1] for name in ("known", "clustered"))
    assert [read(folder, "source", "settings.json")["features"].get("speaker_norm") for folder in folders] == [
        None,
        {"name": "known", "strength": 10.0},
        {"name": "clustered", "strength": 10.0, "embedding": "frames", "clusters": None},
    ]


def test_a_folder_of_another_normalisation_is_refused(recipe, runs):
    status, _, said = recipe("known", "none")
    assert status == 2 and 'speaker_norm: "none" -> "known"' in said and "--output_folder" in said


def test_a_source_of_another_normalisation_is_refused(runs):
    recogniser = runs["none"][0] / "source" / "recogniser"
    features = read(recogniser, "about.json")["features"]
    load_classifier(recogniser, LABELS, features)
    with pytest.raises(RecogniserError, match=r"speaker_norm: found None, wanted .*known.*--speaker_norm"):
        load_classifier(recogniser, LABELS, {**features, "speaker_norm": {"name": "known", "strength": 10.0}})


def test_a_recogniser_trained_with_it_says_that_it_hears_no_speaker(runs, caplog):
    for name in ("none", "known"):
        caplog.clear()
        recogniser = EmotionRecognizer.from_hparams(runs[name][0] / "source" / "recogniser")
        assert ("its offset is 0" in caplog.text) == (name == "known")
    wave = torch.from_numpy(utterance("sad", 1, 1)).float()
    assert float(recogniser.predict_proba(wave).sum()) == pytest.approx(1)


def test_the_upper_bound_on_a_target_without_labels_is_one_error_that_says_what_to_do(tmp_path):
    for number in range(4):
        write_wav(tmp_path / "mine" / f"{number}.wav", utterance("sad", number, 1))
    prepare_folder(tmp_path / "mine", tmp_path / "manifests", {"adapt": 0.6, "test": 0.4})
    methods = {name: SimpleNamespace(uses_labels=name == "oracle", trains=True) for name in ("mi_fuse", "oracle")}
    target = features.CorpusSettings("folder", tmp_path / "manifests", None, None)
    without = {"target": target, "output_folder": tmp_path, "methods": {"mi_fuse": methods["mi_fuse"]}}
    preflight.require_methods_fit(SimpleNamespace(**without))
    with pytest.raises(UserError, match=r"--method: oracle .*'folder' has none .*adapt.json.*Leave it out"):
        preflight.require_methods_fit(SimpleNamespace(**{**without, "methods": methods}))
