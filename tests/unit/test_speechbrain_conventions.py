"""Programs written for SpeechBrain's classifiers and recipes run with this package's recognizers and modules."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.interfaces import foreign_class
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier
from speechbrain_mifuse.utils.audio import BadAudio, load_audio
from speechbrain_mifuse.utils.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "use.md"

# As people write them for SpeechBrain's emotion recognizer; FOLDER, MODULE and CLASS name the model.
LOADING = """
from speechbrain.inference.interfaces import foreign_class
classifier = foreign_class(source="FOLDER", pymodule_file="MODULE", classname="CLASS")
"""
PROGRAMS = {
    "readme": """
out_prob, score, index, text_lab = classifier.classify_file("a.wav")
print(text_lab)
""",
    "web_service": """
out_prob, score, index, text_lab = classifier.classify_file("a.wav")
answer = {"emotion": text_lab[0], "confidence": int(score.numpy()[0] * 100)}
print(answer["emotion"])
""",
    "loaded_signal": """
signal = classifier.load_audio("a.wav")
prediction = classifier.classify_batch(signal)
print(prediction[3][0])
""",
    "loaded_by_speechbrain": """
from speechbrain.dataio import audio_io
signal, fs = audio_io.load("a.wav")
out_prob, score, index, text_lab = classifier.classify_batch(signal)
print(text_lab)
""",
    "microphone": """
import numpy as np
import soundfile
import torch
raw = soundfile.read("a.wav", dtype="int16")[0].tobytes()
signal = np.frombuffer(raw, dtype=np.int16).astype(np.float32) / 32768.0
_, score, _, label = classifier.classify_batch(torch.from_numpy(signal).unsqueeze(0))
print({"label": label[0], "score": score[0].tolist()})
""",
    "label_encoder": """
import torch
out_prob, score, index, text_lab = classifier.classify_file("a.wav")
classifier.hparams.label_encoder.ignore_len()
assert text_lab == classifier.hparams.label_encoder.decode_torch(index)
top = torch.topk(out_prob, 2).indices
print(classifier.hparams.label_encoder.decode_ndim(top)[0])
""",
    "embeddings": """
import torch
signal = classifier.load_audio("a.wav", savedir="audio_cache")
embeddings = classifier.encode_batch(signal.unsqueeze(0), torch.tensor([1.0]), normalize=True)
assert embeddings.shape[0] == 1
print(classifier(signal.unsqueeze(0), torch.tensor([1.0]))[3])
""",
}


class Frames:
    """What `export_recogniser` asks of a source of frames."""

    n_layers, layer, frame_average = 1, 1, 4

    def __init__(self, encoder):
        self.dim = encoder.dim
        self.store = type("Store", (), {"layers": [1]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_encoder):
    """Folder of a recognizer with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "recogniser"
    frames = Frames(FrozenEncoder(str(toy_encoder), [1]))
    hparams = {"labels": LABELS, "encoder": str(toy_encoder), "trim_db": 40.0}
    about = {"labels": LABELS, "features": {}}
    export_recogniser(path, EmotionClassifier(frames.dim, len(LABELS)), frames, hparams, about, temperature=1.5)
    return path


@pytest.fixture(scope="module")
def recogniser(folder):
    return EmotionRecognizer.from_hparams(folder)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write_wav(tmp_path_factory.mktemp("audio") / "a.wav", utterance("sad", 1, 0))


@pytest.fixture(scope="module")
def clip(recording):
    return load_audio(recording)


def run(program, folder, recording, tmp_path, monkeypatch, capsys):
    shutil.copy(recording, tmp_path / "a.wav")
    monkeypatch.chdir(tmp_path)
    loading = LOADING.replace("FOLDER", str(folder)).replace("MODULE", "custom.py").replace("CLASS", "CustomInterface")
    exec(loading + program, {})
    return capsys.readouterr().out


# Programs and folders.


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_for_speechbrains_emotion_recognizer_runs_as_written(
    name, folder, recogniser, recording, tmp_path, monkeypatch, capsys
):
    expected = recogniser.predict_file(recording)[0]
    assert expected in run(PROGRAMS[name], folder, recording, tmp_path, monkeypatch, capsys)


def test_a_folder_exported_by_version_0_1_returns_speechbrains_four_values(
    folder, recording, tmp_path, monkeypatch, capsys
):
    older = shutil.copytree(folder, tmp_path / "older")
    text = (older / "hyperparams.yaml").read_text().replace("temperature: 1.5\n", "")
    text = text.replace("mifuse.recogniser_files.load_weights", "mifuse.inference.load_weights")
    (older / "hyperparams.yaml").write_text(text)
    (older / "custom.py").write_text(
        '"""Lets SpeechBrain\'s `foreign_class` load this folder, where speechbrain-mifuse is installed."""\n\n'
        "from speechbrain_mifuse.inference import EmotionRecognizer as CustomInterface  # noqa: F401\n"
    )
    printed = run(PROGRAMS["readme"], older, recording, tmp_path, monkeypatch, capsys)
    assert printed.strip() in [str([label]) for label in LABELS]


def test_foreign_class_alone_and_with_all_its_options_gives_the_same_answers(folder, recording, recogniser, tmp_path):
    expected = recogniser.classify_file(recording)[0]
    options = {"savedir": str(tmp_path / "cache"), "run_opts": {"device": "cpu"}}
    for given in ({}, options, {**options, "local_strategy": sb.utils.fetching.LocalStrategy.COPY}):
        classifier = foreign_class(source=str(folder), **given)
        assert classifier.classify_file(str(recording))[0].equal(expected)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_a_moved_folder_with_its_own_encoder_loads_where_foreign_class_is_told_of_it(
    folder, toy_encoder, recording, recogniser, tmp_path
):
    moved = shutil.copytree(folder, tmp_path / "moved")
    shutil.copytree(toy_encoder, moved / "encoder")
    text = (moved / "hyperparams.yaml").read_text()
    (moved / "hyperparams.yaml").write_text(text.replace(str(toy_encoder), "/where/it/was"))
    overrides = {"encoder": {"source": f"{moved}/encoder"}}
    classifier = foreign_class(source=str(moved), overrides=overrides)
    expected = recogniser.classify_file(recording)[0]
    assert classifier.classify_file(recording)[0].equal(expected)
    assert EmotionRecognizer.from_hparams(moved).classify_file(recording)[0].equal(expected)


# Files.


def test_a_file_gives_a_batch_of_one_with_probabilities(recogniser, recording, clip):
    out_prob, score, index, text_lab = recogniser.classify_file(str(recording), savedir="anywhere")
    label, probs = recogniser.predict_file(recording)
    assert out_prob.shape == (1, 4) and out_prob[0].equal(probs)
    assert float(out_prob.sum()) == pytest.approx(1, abs=1e-5)
    assert score.equal(out_prob.max(1).values) and index.equal(out_prob.argmax(1)) and text_lab == [label]
    for other in (clip, clip[None], recogniser.load_audio(recording)):
        assert recogniser.classify_batch(other)[0].equal(out_prob)


def test_a_signal_is_loaded_mono_at_the_recognizers_rate(recogniser, tmp_path):
    wave = np.linspace(-0.5, 0.5, 8000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, wave], axis=1), 8000)
    signal = recogniser.load_audio(tmp_path / "stereo.wav")
    assert signal.shape == (16000,) and signal.equal(load_audio(tmp_path / "stereo.wav"))


@pytest.mark.parametrize("url", ["https://example.org/a.wav", "hf://someone/emotions/a.wav", "s3://bucket/a.wav"])
def test_a_url_is_an_error_that_says_to_download_the_file(recogniser, url):
    for call in (recogniser.load_audio, recogniser.classify_file, recogniser.predict_file, recogniser.classify_long):
        with pytest.raises(BadAudio, match=r"a\.wav: is not a local file\. Download it first"):
            call(url)
    (only,) = recogniser.classify_files([url], show_progress=False)
    assert "Download it first" in only.error


# Batches.


def given_as(clip, kind):
    scaled = (clip * 32768).round().clamp(-32768, 32767)
    return {
        "float64": lambda: clip.double(),
        "int16": lambda: scaled.to(torch.int16),
        "int32": lambda: scaled.to(torch.int32) * 65536,
        "float32 array": lambda: clip.numpy(),
        "read-only int16 array": lambda: np.frombuffer(scaled.to(torch.int16).numpy().tobytes(), dtype="<i2"),
        "big-endian array": lambda: scaled.numpy().astype(">i2"),
        "reversed array": lambda: clip.flip(0).numpy()[::-1],
        "with gradient": lambda: clip.clone().requires_grad_(),
    }[kind]()


KINDS = ["float64", "int16", "int32", "float32 array", "read-only int16 array", "big-endian array", "reversed array"]


@pytest.mark.parametrize("kind", [*KINDS, "with gradient"])
@pytest.mark.filterwarnings("error")
def test_samples_of_any_usual_type_give_the_same_answer(recogniser, clip, kind):
    samples = given_as(clip, kind)
    expected, close = recogniser.classify_batch(clip)[0], {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(recogniser.classify_batch(samples)[0], expected, **close)
    torch.testing.assert_close(recogniser.classify_batch(samples[None])[0], expected, **close)
    torch.testing.assert_close(recogniser.classify_long(samples, window_s=60).probs, expected[0], **close)
    (*_, last) = recogniser.stream([samples], 16000, window_s=60, hop_s=60)
    torch.testing.assert_close(last.probs, expected[0], **close)
    exact = recogniser.predict_proba(clip)
    torch.testing.assert_close(recogniser.predict_proba(samples), exact, **close)


def test_eight_bit_samples_are_read_as_wav_files_hold_them(recogniser, clip, tmp_path):
    soundfile.write(tmp_path / "a.wav", clip.numpy(), 16000, subtype="PCM_U8")
    raw = (tmp_path / "a.wav").read_bytes()[-len(clip) :]
    samples = np.frombuffer(raw, dtype=np.uint8)
    expected = recogniser.classify_file(tmp_path / "a.wav")[0]
    torch.testing.assert_close(recogniser.classify_batch(samples)[0], expected, atol=1e-3, rtol=0)


REFUSED = {
    "list": ([0.1] * 16000, "list is neither a tensor nor an array"),
    "bytes": (b"0" * 16000, "bytes is neither a tensor nor an array"),
    "int64": (torch.zeros(16000, dtype=torch.int64), "torch.int64 is not a type of samples"),
    "uint16": (np.zeros(16000, np.uint16), "torch.uint16 is not a type of samples"),
    "bool": (torch.zeros(16000, dtype=torch.bool), "torch.bool is not a type of samples"),
    "complex": (torch.zeros(16000, dtype=torch.complex64), "torch.complex64 is not a type of samples"),
    "text array": (np.array(["a"]), "<U1 is not a type of samples"),
    "NaN": (torch.full((16000,), float("nan")), "holds NaN or infinite"),
    "infinite": (torch.full((16000,), float("-inf")), "holds NaN or infinite"),
    "16-bit scale": (torch.full((16000,), 12000.0), "reaches 12000, but full scale is 1.0. Divide 16-bit samples"),
    "empty": (torch.zeros(0), "holds no samples"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_a_waveform_is_one_error_in_every_method_that_takes_samples(recogniser, what):
    samples, message = REFUSED[what]
    for call in (recogniser.classify_batch, recogniser.encode_batch, recogniser.predict_proba):
        with pytest.raises(UserError, match=rf"^wav.*: {message}"):
            call(samples)
    if what == "empty":  # nothing new in a stream
        return
    with pytest.raises(UserError, match=rf"^chunk 0: {message}"):
        list(recogniser.stream([samples], 16000))
    with pytest.raises(UserError, match=rf"^recording: {message}"):
        recogniser.classify_long(samples)


@pytest.mark.parametrize("shape", [(), (1, 1, 16000), (2, 16000, 1), (1, 0)])
def test_a_batch_of_another_shape_is_an_error_that_says_the_right_one(recogniser, shape):
    with pytest.raises(UserError, match=r"wavs: shape \[.*\] is not \[batch, samples\]|wavs\[0\]: holds no samples"):
        recogniser.classify_batch(torch.zeros(shape))


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        (torch.tensor([1.0]), r"wav_lens: shape \[1\] is not \[2\]"),
        (torch.tensor(1.0), r"wav_lens: shape \[\] is not \[2\]"),
        (torch.ones(2, 1), r"wav_lens: shape \[2, 1\] is not \[2\]"),
        (torch.tensor([1.0, 0.0]), r"wav_lens\[1\]: 0 is not in \(0, 1\]"),
        (torch.tensor([1.0, -0.5]), r"wav_lens\[1\]: -0.5 is not in"),
        (torch.tensor([1.0, float("nan")]), r"wav_lens\[1\]: nan is not in"),
        (torch.tensor([4000, 2000]), r"wav_lens\[0\]: 4000 is not in .* Divide lengths in samples by wavs.shape"),
        ("long", r"wav_lens: str is not a tensor"),
    ],
)
def test_lengths_that_do_not_fit_the_batch_are_an_error_naming_one(recogniser, clip, lens, message):
    with pytest.raises(UserError, match=message):
        recogniser.classify_batch(torch.stack([clip, clip]), lens)


def test_lengths_may_come_as_a_list_or_an_array_and_nothing_behind_them_is_heard(recogniser, clip):
    short = clip[: len(clip) // 2]
    wavs = torch.stack([clip, torch.nn.functional.pad(short, (0, len(clip) - len(short)), value=float("nan"))])
    lens = [1.0, len(short) / len(clip)]
    expected = torch.cat([recogniser.classify_batch(one)[0] for one in (clip, short)])
    embedded = torch.cat([recogniser.encode_batch(one) for one in (clip, short)])
    for given in (lens, np.array(lens), torch.tensor(lens), torch.tensor(lens, dtype=torch.float64)):
        torch.testing.assert_close(recogniser.classify_batch(wavs, given)[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(recogniser.encode_batch(wavs, given), embedded, atol=1e-5, rtol=0)


def test_a_batch_of_nothing_gives_nothing(recogniser):
    out_prob, score, index, text_lab = recogniser.classify_batch(torch.zeros(0, 16000))
    assert out_prob.shape == (0, 4) and score.shape == index.shape == (0,) and text_lab == []
    assert recogniser.encode_batch(torch.zeros(0, 16000)).shape == (
        0,
        recogniser.encode_batch(torch.ones(16000)).shape[1],
    )


def test_embeddings_are_what_the_classifiers_head_takes(recogniser, clip):
    logits = recogniser.mods.classifier.head(recogniser.encode_batch(clip), stochastic=False)
    torch.testing.assert_close((logits / 1.5).softmax(-1), recogniser.classify_batch(clip)[0], atol=1e-5, rtol=0)


def test_the_device_follows_to(folder, clip):
    recogniser = EmotionRecognizer.from_hparams(folder)
    expected = recogniser.predict_proba(clip)
    assert recogniser.to("cpu").predict_proba(clip).equal(expected) and recogniser.device == "cpu"
    recogniser.to("meta")  # a device that every machine has
    assert (recogniser.device, recogniser.device_type) == ("meta", "meta")
    assert recogniser.load_audio(write_wav(folder.parent / "b.wav", clip.numpy())).device.type == "meta"


# The modules in a recipe of SpeechBrain's.

RECIPE = """
encoder_dim: 16
out_n_neurons: 4
wav2vec2: !new:torch.nn.Unflatten [1, [-1, 16]]
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
"""


class EmotionBrain(sb.Brain):
    """Forward pass and optimizer as SpeechBrain's IEMOCAP recipe has them."""

    def compute_forward(self, batch, stage):
        wavs, lens = batch
        outputs = self.modules.wav2vec2(wavs)
        outputs = self.hparams.avg_pool(outputs, lens)
        outputs = outputs.view(outputs.shape[0], -1)
        return self.hparams.log_softmax(self.modules.output_mlp(outputs))

    def compute_objectives(self, predictions, batch, stage):
        return sb.nnet.losses.nll_loss(predictions, torch.arange(len(predictions)))

    def init_optimizers(self):
        self.optimizer = self.opt_class(self.hparams.model.parameters())
        self.optimizers_dict = {"opt_class": self.optimizer}


@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_pages_yaml_puts_adapter_and_pooling_into_speechbrains_recipe(with_adapter):
    block = re.search(r"^```yaml\n(avg_pool.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    if not with_adapter:
        block = re.sub(r"    adapter: .*\n +input_size.*\n", "", block)
    hparams = load_hyperpyyaml(io.StringIO(RECIPE + block))
    brain = EmotionBrain(hparams["modules"], lambda params: torch.optim.Adam(params, lr=0.01), hparams)
    before = {name: weight.detach().clone() for name, weight in hparams["model"].named_parameters()}
    rng = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 16 * 12, generator=rng), torch.tensor([0.5, 1.0])
    brain.fit(range(2), torch.utils.data.DataLoader([batch], batch_size=None), progressbar=False)
    still = [name for name, weight in hparams["model"].named_parameters() if weight.equal(before[name])]
    assert any("pooling" in name for name in before) and any("adapter" in name for name in before) == with_adapter
    assert not still
    brain.modules.eval()
    together = brain.compute_forward(batch, sb.Stage.TEST)
    alone = brain.compute_forward((batch[0][:1, : 16 * 6], torch.ones(1)), sb.Stage.TEST)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
