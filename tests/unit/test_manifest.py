"""Manifests: splits by speaker that depend on nothing else, bad recordings left out, one clear error otherwise."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy_corpora import write_ravdess, write_wav

from speechbrain_mifuse.corpora import corpus as corpus_module
from speechbrain_mifuse.corpora import manifest
from speechbrain_mifuse.corpora import splits as splits_module
from speechbrain_mifuse.corpora.corpus import Corpus, find_corpus, map_label
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance, read_manifest, unlabelled
from speechbrain_mifuse.corpora.ravdess import RAVDESS, prepare_ravdess
from speechbrain_mifuse.corpora.splits import split_groups, thin_out
from speechbrain_mifuse.utils.files import atomic_write

SPLITS = {"adapt": 0.6, "test": 0.4}


def noise(seed, seconds=0.01):
    return 0.1 * np.random.default_rng(seed).normal(size=int(16000 * seconds))


def recordings(root, speakers=("a", "b", "c", "d", "e"), each=2):
    """Short recordings of each speaker, listed."""
    listed = []
    for number, (speaker, take) in enumerate((speaker, take) for speaker in speakers for take in range(each)):
        wav = write_wav(root / f"{speaker}{take}.wav", noise(number))
        listed.append(Utterance(f"toy-{speaker}{take}", wav, ("angry", "sad")[take % 2], speaker))
    return listed


def prepare(listed, root, splits=SPLITS, order=("a", "b", "c", "d", "e")):
    return toy_corpus(order).write_splits(listed, root, root / "m", splits)


def toy_corpus(order=(), group="speaker"):
    return Corpus("toy", "toy", "*.wav", order, lambda folder: [], group)


def rows(root, split):
    return json.loads((root / "m" / f"{split}.json").read_text())


def test_no_speaker_is_in_two_splits_and_no_recording_is_lost(tmp_path):
    listed = recordings(tmp_path)
    paths = prepare(listed, tmp_path, {"train": 0.4, "valid": 0.2, "test": 0.4})
    speakers = [{row["speaker"] for row in read_manifest(path).values()} for path in paths.values()]
    assert [sorted(group) for group in speakers] == [["a", "b"], ["c"], ["d", "e"]]
    found = [key for path in paths.values() for key in read_manifest(path)]
    assert sorted(found) == sorted(utterance.utt_id for utterance in listed)


def test_the_order_in_which_recordings_are_listed_changes_no_byte(tmp_path):
    listed = recordings(tmp_path)
    first = [path.read_bytes() for path in prepare(listed, tmp_path).values()]
    (tmp_path / "m" / "corpus.json").unlink()
    assert [path.read_bytes() for path in prepare(listed[::-1], tmp_path).values()] == first


def test_speakers_are_dealt_in_the_corpus_order_and_unknown_ones_follow_by_name(tmp_path):
    prepare(recordings(tmp_path, "zabc"), tmp_path, {"train": 0.5, "test": 0.5}, order=("c", "missing", "a"))
    assert [{row["speaker"] for row in rows(tmp_path, split).values()} for split in ("train", "test")] == [
        {"c", "a"},
        {"b", "z"},
    ]


def test_neither_directory_order_nor_hash_seed_nor_training_seed_changes_a_manifest(tmp_path, monkeypatch):
    corpus, save = write_ravdess(tmp_path / "ravdess", takes=1), tmp_path / "m"
    plain = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: reversed(sorted(plain(self, pattern))))
    prepare_ravdess(corpus, save, SPLITS)
    code = (
        "import random, sys, numpy, torch; seed = int(sys.argv[3])\n"
        "random.seed(seed); numpy.random.seed(seed); torch.manual_seed(seed)\n"
        "from speechbrain_mifuse.corpora.ravdess import prepare_ravdess\n"
        "prepare_ravdess(sys.argv[1], sys.argv[2], {'adapt': 0.6, 'test': 0.4})"
    )
    other = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code, corpus, tmp_path / "other", "5"], env=other, check=True)
    for name in ("adapt.json", "test.json", "adapt_unlabelled.json", "test_unlabelled.json"):
        assert (save / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_the_unlabelled_twin_is_the_manifest_without_emotions(tmp_path):
    for path in prepare(recordings(tmp_path), tmp_path).values():
        labelled, bare = json.loads(path.read_text()), json.loads(unlabelled(path).read_text())
        assert all(row["emo"] in ("angry", "sad") for row in labelled.values())
        assert bare == {key: {k: v for k, v in row.items() if k != "emo"} for key, row in labelled.items()}
        assert "emo" not in unlabelled(path).read_text() and "angry" not in unlabelled(path).read_text()


def test_rows_hold_path_below_the_root_length_label_and_speaker(tmp_path):
    prepare(recordings(tmp_path), tmp_path)
    assert rows(tmp_path, "adapt")["toy-a0"] == {
        "wav": "{data_root}/a0.wav",
        "length": 0.01,
        "emo": "angry",
        "speaker": "a",
    }
    assert read_manifest(tmp_path / "m" / "adapt.json")["toy-a0"]["wav"] == str(tmp_path / "a0.wav")


def test_a_manifest_of_a_corpus_without_sessions_is_what_it_always_was_to_the_byte(tmp_path):
    # Finished runs are known by the digest of their manifests.
    prepare(recordings(tmp_path, "ab", each=1), tmp_path, {"adapt": 0.5, "test": 0.5})
    assert (tmp_path / "m" / "adapt.json").read_text() == (
        '{\n "toy-a0": {\n  "wav": "{data_root}/a0.wav",\n  "length": 0.01,\n  "emo": "angry",\n  "speaker": "a"\n }\n}'
    )


def in_partitions(root, **partitions):
    """Recordings of one speaker per letter, in official partitions: partition=letters."""
    where = {speaker: name for name, speakers in partitions.items() for speaker in speakers}
    return [dataclasses.replace(u, partition=where[u.speaker]) for u in recordings(root, tuple(where))]


def test_splits_may_be_lists_of_official_partitions_and_the_rows_name_them(tmp_path):
    listed = in_partitions(tmp_path, Train="ab", Development="cd", Test1="e")
    prepare(listed, tmp_path, {"adapt": ["Train", "Development"], "test": ["Test1"]})
    assert {row["partition"] for row in rows(tmp_path, "adapt").values()} == {"Train", "Development"}
    assert {row["speaker"] for row in rows(tmp_path, "test").values()} == {"e"}


def test_recordings_of_a_partition_that_no_split_asks_for_are_not_even_opened(tmp_path):
    listed = in_partitions(tmp_path, Train="ab", Test1="e")
    damage(tmp_path / "a0.wav", "no audio")
    prepare([*listed], tmp_path, {"test": ["Test1"]})
    assert json.loads((tmp_path / "m" / "skipped.json").read_text()) == {}


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"adapt": ["Trian"], "test": ["Test1"]}, "partition Trian is unknown"),
        ({"adapt": ["Test1"], "test": ["Test1"]}, "partition Test1 .* is asked for twice"),
        ({"adapt": 0.5, "test": ["Test1"]}, "must be shares that add up to 1, or lists of partitions"),
        ({"adapt": "Train", "test": "Test1"}, "must be shares that add up to 1, or lists of partitions"),
    ],
)
def test_partitions_that_cannot_be_given_are_one_error(splits, says, tmp_path):
    with pytest.raises(CorpusError, match=says):
        prepare(in_partitions(tmp_path, Train="ab", Test1="e"), tmp_path, splits)


def test_partitions_of_a_corpus_that_has_none_are_an_error(tmp_path):
    with pytest.raises(CorpusError, match="speaker Test1, Train is unknown"):
        prepare(recordings(tmp_path), tmp_path, {"adapt": ["Train"], "test": ["Test1"]})


def test_sessions_stay_together_when_they_are_what_is_dealt(tmp_path):
    session = dict(zip("abcde", ("s2", "s1", "s1", "s3", "s2"), strict=True))
    listed = [dataclasses.replace(u, session=session[u.speaker]) for u in recordings(tmp_path)]
    corpus = toy_corpus(("s3", "s1"), "session")
    corpus.write_splits(listed, tmp_path, tmp_path / "m", {"adapt": 0.6, "test": 0.4})
    assert {row["session"] for row in rows(tmp_path, "adapt").values()} == {"s3", "s1"}
    assert {row["speaker"] for row in rows(tmp_path, "test").values()} == {"a", "e"}


# Simulated class skew.


def test_skew_takes_its_share_of_the_first_split_alone_whatever_the_order_of_the_files(tmp_path):
    listed = recordings(tmp_path, each=6)
    whole = {split: Counter(r["emo"] for r in read_manifest(path).values()) for split, path in prepare_all(listed)}
    first = [path.read_bytes() for _, path in prepare_all(listed, keep={"sad": 0.5})]
    skewed = {split: Counter(row["emo"] for row in rows(tmp_path, split).values()) for split in SPLITS}
    assert whole["adapt"] == {"angry": 9, "sad": 9} and skewed["adapt"] == {"angry": 9, "sad": 4}
    assert skewed["test"] == whole["test"]
    assert [path.read_bytes() for _, path in prepare_all(listed[::-1], keep={"sad": 0.5})] == first
    assert json.loads((tmp_path / "m" / "corpus.json").read_text())["keep"] == {"sad": 0.5}


def prepare_all(listed, **options):
    root = listed[0].wav.parent
    return toy_corpus().write_splits(listed, root, root / "m", SPLITS, **options).items()


def test_a_smaller_share_keeps_a_part_of_what_a_larger_one_keeps():
    listed = [Utterance(f"t-{number}", Path("a.wav"), "sad", "1") for number in range(40)]
    kept = [{u.utt_id for u in thin_out(listed, {"sad": share})} for share in (0.0, 0.25, 0.5, 1.0)]
    assert [len(ids) for ids in kept] == [0, 10, 20, 40]
    assert kept[0] < kept[1] < kept[2] < kept[3]


@pytest.mark.parametrize("keep", [{"joy": 0.5}, {"sad": 1.5}, {"sad": "half"}])
def test_a_skew_of_no_label_or_no_share_is_an_error_that_lists_the_labels(keep, tmp_path):
    with pytest.raises(CorpusError, match=r"keep: .* share between 0 and 1 of one of these labels: angry, sad"):
        prepare_all(recordings(tmp_path), keep=keep)


def test_another_skew_is_prepared_again_and_the_same_one_is_not(tmp_path, caplog):
    corpus = write_ravdess(tmp_path / "ravdess")
    with caplog.at_level("INFO"):
        for keep, skipped in (({"sad": 0.5}, 0), ({"sad": 0.5}, 1), ({"sad": 0.2}, 0), (None, 0)):
            caplog.clear()
            prepare_ravdess(corpus, tmp_path / "m", SPLITS, keep=keep)
            assert caplog.text.count("preparation skipped") == skipped


def damage(path, how):
    if how == "copy":
        path.write_bytes((path.parent / "a0.wav").read_bytes())
    elif how == "empty file":
        path.write_bytes(b"")
    elif how == "no samples":
        soundfile.write(path, np.zeros(0), 16000)
    elif how == "no audio":
        path.write_text("this is text\n" * 20)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["copy", "empty file", "no samples", "no audio", "missing"])
def test_a_bad_recording_is_left_out_and_listed(tmp_path, how, caplog):
    listed = recordings(tmp_path)
    damage(tmp_path / "b0.wav", how)
    prepare(listed, tmp_path)
    assert set(rows(tmp_path, "adapt")) == {"toy-a0", "toy-a1", "toy-b1", "toy-c0", "toy-c1"}
    skipped = json.loads((tmp_path / "m" / "skipped.json").read_text())
    assert list(skipped) == ["toy-b0"] and str(tmp_path / "b0.wav") in skipped["toy-b0"]
    assert "b0.wav" in caplog.text


def test_the_copy_names_what_it_is_a_copy_of_even_across_speakers_and_splits(tmp_path):
    listed = recordings(tmp_path)
    (tmp_path / "e1.wav").write_bytes((tmp_path / "a0.wav").read_bytes())
    prepare(listed, tmp_path)
    assert set(rows(tmp_path, "test")) == {"toy-d0", "toy-d1", "toy-e0"}
    assert "copy of" in (tmp_path / "m" / "skipped.json").read_text()
    assert str(tmp_path / "a0.wav") in json.loads((tmp_path / "m" / "skipped.json").read_text())["toy-e1"]


def test_recordings_of_equal_size_and_other_content_all_stay(tmp_path):
    listed = recordings(tmp_path)
    assert len({utterance.wav.stat().st_size for utterance in listed}) == 1
    prepare(listed, tmp_path)
    assert json.loads((tmp_path / "m" / "skipped.json").read_text()) == {}


def test_a_split_without_a_readable_recording_is_an_error(tmp_path):
    listed = recordings(tmp_path)
    for name in ("d0", "d1", "e0", "e1"):
        damage(tmp_path / f"{name}.wav", "no audio")
    with pytest.raises(CorpusError, match="split 'test' holds no readable recording"):
        prepare(listed, tmp_path)
    assert not (tmp_path / "m" / "corpus.json").exists()


def test_a_doubled_id_is_an_error_naming_both_files(tmp_path):
    listed = recordings(tmp_path)
    twin = Utterance(listed[0].utt_id, listed[1].wav, "sad", "a")
    with pytest.raises(CorpusError, match=r"a0.wav and .*a1.wav share the id 'toy-a0'"):
        prepare([*listed, twin], tmp_path)


def test_an_unknown_label_is_an_error_naming_the_file_and_the_label():
    with pytest.raises(CorpusError, match=r"03a01Xa.wav: unknown label 'X'; known are L, W"):
        map_label({"W": "angry", "L": None}, "X", "03a01Xa.wav")


@pytest.mark.parametrize("splits", [{"train": 0.5, "test": 0.4}, {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}])
def test_shares_that_cannot_be_dealt_are_an_error(splits):
    with pytest.raises(CorpusError, match="Cannot deal 3 speakers"):
        split_groups(["1", "2", "3"], splits)


def test_every_split_gets_a_speaker_however_small_its_share():
    dealt = split_groups(["1", "2", "3"], {"train": 0.98, "valid": 0.01, "test": 0.01})
    assert dealt == {"train": ["1"], "valid": ["2"], "test": ["3"]}


@pytest.mark.parametrize("given", ["itself", "above", "beside", "environment"])
def test_a_corpus_is_found_at_every_place_that_the_error_message_names(tmp_path, given, monkeypatch, no_corpora):
    write_wav(tmp_path / "ravdess" / "Actor_01" / "a.wav", noise(0))
    (tmp_path / "nemo").mkdir()
    place = {"itself": tmp_path / "ravdess", "above": tmp_path, "beside": tmp_path / "nemo", "environment": None}[given]
    if given == "environment":
        monkeypatch.setenv("MIFUSE_CORPORA", str(tmp_path))
    assert find_corpus("ravdess", "Actor_*", place) == tmp_path / "ravdess"


def test_a_missing_folder_is_an_error_naming_the_flag_and_the_place(tmp_path, no_corpora):
    with pytest.raises(CorpusError, match=r"'ravdess' not found.*nowhere.*--data_folder"):
        prepare_ravdess(tmp_path / "nowhere", tmp_path / "m", SPLITS)


def test_a_mistyped_folder_does_not_fall_back_to_the_environment(tmp_path, toy_folder, monkeypatch):
    monkeypatch.setenv("MIFUSE_CORPORA", str(toy_folder))
    with pytest.raises(CorpusError, match="nowhere is no folder"):
        prepare_ravdess(tmp_path / "nowhere", tmp_path / "m", SPLITS)


def test_no_folder_at_all_is_an_error_naming_the_flag_and_the_variable(tmp_path, no_corpora):
    with pytest.raises(CorpusError, match=r"no folder was given.*--data_folder.*MIFUSE_CORPORA"):
        prepare_ravdess(None, tmp_path / "m", SPLITS)


def test_a_folder_without_recordings_is_an_error_naming_the_flag(tmp_path, no_corpora):
    (tmp_path / "ravdess" / "Actor_01").mkdir(parents=True)
    with pytest.raises(CorpusError, match=r"no utterance found.*--data_folder"):
        prepare_ravdess(tmp_path, tmp_path / "m", SPLITS)


def test_prepared_manifests_are_not_written_again_and_the_log_says_so(tmp_path, caplog):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    before = (tmp_path / "m" / "adapt.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    assert (tmp_path / "m" / "adapt.json").stat().st_mtime_ns == before
    assert "preparation skipped" in caplog.text


@pytest.mark.parametrize("change", ["added", "removed", "another speaker"])
def test_recordings_that_came_or_went_since_are_noticed(tmp_path, change):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    wav = corpus / "Actor_01" / "03-01-05-01-01-01-01.wav"
    if change == "added":
        write_wav(wav.with_name("03-01-05-01-01-09-01.wav"), noise(1))
    elif change == "removed":
        wav.unlink()
    else:
        wav.rename(wav.with_name("03-01-05-01-01-01-06.wav"))
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    size = {"added": 21, "removed": 19, "another speaker": 20}[change]
    assert sum(len(read_manifest(tmp_path / "m" / f"{split}.json")) for split in SPLITS) == size


@pytest.mark.parametrize("name", ["test.json", "adapt_unlabelled.json"])
def test_a_missing_manifest_is_an_error_whose_remedy_is_true(tmp_path, name):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    before = (tmp_path / "m" / name).read_bytes()
    (tmp_path / "m" / name).unlink()
    with pytest.raises(CorpusError, match=f"{name}: not found. Delete .*corpus.json and run the recipe again"):
        read_manifest(tmp_path / "m" / name)
    (tmp_path / "m" / "corpus.json").unlink()
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    assert (tmp_path / "m" / name).read_bytes() == before


def test_a_split_that_was_never_asked_for_is_an_error_that_lists_those_that_were(tmp_path):
    prepare(recordings(tmp_path), tmp_path)
    with pytest.raises(CorpusError, match=r"valid.json: not found. It was prepared for the splits adapt, test alone"):
        read_manifest(tmp_path / "m" / "valid.json")


def test_the_order_of_the_splits_counts(tmp_path):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    for splits in ({"adapt": 0.4, "test": 0.6}, {"test": 0.6, "adapt": 0.4}):
        prepare_ravdess(corpus, tmp_path / "m", splits)
        first = next(iter(splits))
        assert "01" in {row["speaker"] for row in rows(tmp_path, first).values()}


@pytest.mark.parametrize("change", ["splits", "root", "version", "damaged"])
def test_manifests_of_other_arguments_are_written_again(tmp_path, change, monkeypatch):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    (tmp_path / "m" / "adapt.json").write_text("{}")
    splits = SPLITS
    if change == "splits":
        splits = {"adapt": 0.8, "test": 0.2}
    elif change == "root":
        corpus = write_ravdess(tmp_path / "second", takes=1)
    elif change == "version":
        monkeypatch.setattr(splits_module, "__version__", "99")
    else:
        (tmp_path / "m" / "corpus.json").write_text("{")
    prepare_ravdess(corpus, tmp_path / "m", splits)
    assert len(read_manifest(tmp_path / "m" / "adapt.json")) == (16 if change == "splits" else 12)


def test_a_killed_preparation_is_done_again(tmp_path, monkeypatch):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    assert len(read_manifest(tmp_path / "m" / "test.json")) == 8


def test_a_preparation_killed_between_two_dealings_does_not_count_as_either(tmp_path, monkeypatch):
    corpus, whole = write_ravdess(tmp_path / "ravdess", takes=1), manifest.write_manifest
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)

    def killed_at_the_second(corpus, rows, path):
        if path.name == "test.json":
            raise KeyboardInterrupt
        return whole(corpus, rows, path)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "write_manifest", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            prepare_ravdess(corpus, tmp_path / "m", {"adapt": 0.8, "test": 0.2})
    prepare_ravdess(corpus, tmp_path / "m", SPLITS)
    speakers = [{row["speaker"] for row in rows(tmp_path, split).values()} for split in SPLITS]
    assert speakers == [{"01", "02", "03"}, {"04", "05"}]


def test_a_manifest_that_is_none_is_an_error_naming_it(tmp_path):
    atomic_write(tmp_path / "corpus.json", '{"data_root": "/toy"}')
    with pytest.raises(CorpusError, match=r"train.json: not found"):
        read_manifest(tmp_path / "train.json")
    for content in ("[1]", "{", '{"a": {"emo": "sad"}}'):
        atomic_write(tmp_path / "train.json", content)
        with pytest.raises(CorpusError, match=r"train.json: not a manifest"):
            read_manifest(tmp_path / "train.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_new_corpus_is_one_object(tmp_path, no_corpora):
    listed = recordings(tmp_path / "mine")
    corpus = Corpus("mine", "mine", "*.wav", ("e", "d", "c", "b", "a"), lambda folder: listed)
    corpus.prepare(tmp_path / "mine", tmp_path / "mine" / "m", SPLITS)
    assert {row["speaker"] for row in rows(tmp_path / "mine", "adapt").values()} == {"e", "d", "c"}


def test_ravdess_test_speakers_are_the_last_ones(tmp_path):
    corpus = write_ravdess(tmp_path / "ravdess", takes=1)
    RAVDESS.prepare(corpus, tmp_path / "m", SPLITS)
    assert json.loads((tmp_path / "m" / "corpus.json").read_text())["speakers"] == {
        "adapt": ["01", "02", "03"],
        "test": ["04", "05"],
    }
