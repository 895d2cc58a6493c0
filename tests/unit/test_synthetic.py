"""The synthetic domains: reproducible, balanced, resumable, and different from one another."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError, read_manifest
from speechbrain_mifuse.demo import synthetic

needs_espeak = pytest.mark.skipif(
    not importlib.util.find_spec("espeakng_loader"),
    reason="eSpeak NG not installed (demo extra)",
)


@pytest.fixture
def small(monkeypatch):
    """One take of each emotion and speaker: 40 clips a domain."""
    monkeypatch.setattr(synthetic, "TAKES", 1)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Domain B, one take."""
    folder = tmp_path_factory.mktemp("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "TAKES", 1)
        synthetic.render_domain(folder, "B")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def treble_share(wave, above=3600):
    power = np.abs(np.fft.rfft(wave.astype(float))) ** 2
    return power[np.fft.rfftfreq(len(wave), 1 / synthetic.SAMPLE_RATE) > above].sum() / power.sum()


def clips_of(domain, emo):
    return [clip for clip in synthetic.list_clips(domain) if clip.emo == emo]


@needs_espeak
@pytest.mark.parametrize("domain", sorted(synthetic.DOMAINS))
def test_a_clip_does_not_depend_on_what_was_rendered_before(domain):
    clips, spec = synthetic.list_clips(domain)[:: synthetic.TAKES], synthetic.DOMAINS[domain]
    first = [synthetic.render_clip(clip, spec).tobytes() for clip in clips]
    again = [synthetic.render_clip(clip, spec).tobytes() for clip in reversed(clips)]
    assert first == again[::-1]


@needs_espeak
def test_another_process_renders_the_same_bytes():
    clip = clips_of("C", "happy")[7]
    program = (
        "import hashlib, speechbrain_mifuse.demo.synthetic as s;"
        f"c = next(c for c in s.list_clips('C') if c.clip_id == '{clip.clip_id}');"
        "print(hashlib.sha256(s.render_clip(c, s.DOMAINS['C']).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    wave = synthetic.render_clip(clip, synthetic.DOMAINS["C"])
    assert other.stdout.strip() == hashlib.sha256(wave.tobytes()).hexdigest()


@needs_espeak
def test_another_seed_gives_another_clip():
    clip, spec = synthetic.list_clips("A")[0], synthetic.DOMAINS["A"]
    one, two = synthetic.render_clip(clip, spec, 0), synthetic.render_clip(clip, spec, 1)
    assert one.tobytes() != two.tobytes()


@pytest.mark.parametrize("domain", sorted(synthetic.DOMAINS))
def test_emotions_are_balanced_for_every_speaker_and_sentence(domain):
    clips = synthetic.list_clips(domain)
    assert set(Counter(clip.emo for clip in clips)) == set(LABELS)
    assert 240 <= len(clips) <= 320
    for key in ("speaker", "text"):
        counts = Counter((getattr(clip, key), clip.emo) for clip in clips)
        for value in {getattr(clip, key) for clip in clips}:
            assert len({counts[value, emo] for emo in LABELS}) == 1, value


def test_domains_share_no_speaker_no_voice_variant_and_no_id():
    listed = {domain: synthetic.list_clips(domain) for domain in synthetic.DOMAINS}
    for field in ("speaker", "voice", "clip_id"):
        seen = [{getattr(clip, field) for clip in clips} for clips in listed.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))
    variants = [variant for spec in synthetic.DOMAINS.values() for variant in spec.voices]
    assert len(variants) == len(set(variants))


@needs_espeak
def test_files_are_16_khz_mono_16_bit_of_one_to_four_seconds(rendered):
    infos = [soundfile.info(str(path)) for path in (rendered / "B").glob("*.wav")]
    assert len(infos) == 40
    assert {(i.samplerate, i.channels, i.subtype) for i in infos} == {(16000, 1, "PCM_16")}
    assert all(1.0 < i.duration < 4.0 for i in infos)


@needs_espeak
def test_rendering_resumes_after_a_file_is_deleted(rendered, small):
    folder = rendered / "B"
    before = contents(folder)
    kept = folder / "synb-b01-sad-0.wav"
    stamp = kept.stat().st_mtime_ns
    (folder / "synb-b02-angry-0.wav").unlink()
    (folder / "clips.json").unlink()
    synthetic.render_domain(rendered, "B")
    assert contents(folder) == before
    assert kept.stat().st_mtime_ns == stamp


@needs_espeak
def test_an_interrupted_rendering_has_no_label_table_and_continues(tmp_path, small, monkeypatch):
    real, done = synthetic.render_clip, []

    def breaks_off(*args):
        done.append(args)
        if len(done) > 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(synthetic, "render_clip", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        synthetic.render_domain(tmp_path, "A")
    with pytest.raises(CorpusError, match="Render the domain"):
        synthetic.list_synthetic(tmp_path / "A")
    monkeypatch.setattr(synthetic, "render_clip", real)
    assert len(list((tmp_path / "A").glob("*.wav"))) == 3
    clips = synthetic.render_domain(tmp_path, "A")
    assert len(synthetic.list_synthetic(tmp_path / "A")) == len(clips) == 40


@needs_espeak
def test_a_folder_of_another_seed_is_refused(rendered, small):
    with pytest.raises(CorpusError, match="another seed"):
        synthetic.render_domain(rendered, "B", seed=1)


@needs_espeak
def test_telephone_ends_at_3600_hz_and_the_studio_does_not():
    shares = {}
    for domain in "AB":
        waves = [synthetic.render_clip(clip, synthetic.DOMAINS[domain]) for clip in clips_of(domain, "neutral")]
        shares[domain] = [treble_share(wave) for wave in waves]
    assert max(shares["B"]) < 0.002
    assert np.median(shares["A"]) > 0.01


def test_room_reverberates_after_the_sound_has_stopped():
    wave = np.zeros(16000)
    wave[:1600] = synthetic.noise(1600, -10.0, np.random.default_rng(0))
    own, now = (synthetic.generator(0, name) for name in ("c01", "clip"))
    wet = synthetic.room(wave, own, now)
    just_after, later = wet[1600:2400].std(), wet[12000:].std()
    assert just_after > 5 * later


@needs_espeak
def test_prosody_follows_the_published_correlates():
    spec, loud, long = synthetic.DOMAINS["A"], {}, {}
    for emo in LABELS:
        waves = [synthetic.render_clip(clip, spec) / 32768 for clip in clips_of("A", emo)[::3]]
        loud[emo] = np.mean([20 * np.log10(wave.std()) for wave in waves])
        long[emo] = np.mean([len(wave) for wave in waves])
    assert loud["angry"] > loud["neutral"] > loud["sad"]
    assert long["sad"] > long["neutral"] > long["angry"]


@needs_espeak
def test_manifests_are_speaker_independent(rendered, tmp_path):
    splits = {"train": 0.6, "valid": 0.2, "test": 0.2}
    synthetic.prepare_synthetic(rendered, tmp_path, splits, domain="B")
    rows = {split: read_manifest(tmp_path / f"{split}.json") for split in splits}
    speakers = {split: {row["speaker"] for row in entries.values()} for split, entries in rows.items()}
    assert [len(speakers[split]) for split in splits] == [6, 2, 2]
    assert len(set.union(*speakers.values())) == 10
    assert all(soundfile.info(row["wav"]).frames for row in rows["test"].values())
    assert json.loads((tmp_path / "skipped.json").read_text()) == {}


@needs_espeak
def test_the_folder_of_another_domain_does_not_pass(rendered, tmp_path):
    with pytest.raises(CorpusError, match="'A' not found"):
        synthetic.prepare_synthetic(rendered / "B", tmp_path, {"train": 1.0}, domain="A")


def test_an_unknown_domain_is_named(tmp_path):
    with pytest.raises(CorpusError, match="No synthetic domain 'D'"):
        synthetic.list_clips("D")
    with pytest.raises(CorpusError, match="No synthetic domain 'D'"):
        synthetic.prepare_synthetic(tmp_path, tmp_path, {"train": 1.0}, domain="D")


def test_a_damaged_label_table_is_named(tmp_path):
    (tmp_path / "clips.json").write_text('[{"file": "x.wav"}]')
    with pytest.raises(CorpusError, match=r"clips\.json: not a label table"):
        synthetic.list_synthetic(tmp_path)


def test_without_the_package_the_message_names_the_demo_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(CorpusError, match=r"speechbrain-mifuse\[demo\]"):
        synthetic.render_domain(tmp_path, "A")


@needs_espeak
def test_an_unknown_voice_is_named():
    with pytest.raises(CorpusError, match="no voice 'xx-nowhere'"):
        synthetic.speak("Hello.", "xx-nowhere", 170, 50, 50, 0, seed=1)
