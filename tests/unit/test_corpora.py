"""Each corpus: file names parsed, classes mapped, and the true releases counted."""

import json
from collections import Counter

import pytest
from toy_corpora import write_emodb, write_nemo, write_ravdess

from speechbrain_mifuse.corpora import emodb, nemo, ravdess
from speechbrain_mifuse.corpora.emodb import list_emodb, prepare_emodb
from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError, read_manifest
from speechbrain_mifuse.corpora.nemo import list_nemo, prepare_nemo
from speechbrain_mifuse.corpora.ravdess import list_ravdess, prepare_ravdess

WHOLE = {"all": 1.0}
CORPORA = {
    "ravdess": (write_ravdess, list_ravdess, prepare_ravdess, "rav-"),
    "nemo": (write_nemo, list_nemo, prepare_nemo, "nemo-"),
    "emodb_2s": (write_emodb, list_emodb, prepare_emodb, "emodb-"),
}


def found(utterances):
    return {utterance.utt_id: (utterance.emo, utterance.speaker) for utterance in utterances}


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("name", CORPORA)
def test_a_small_tree_of_true_form_gives_every_class_and_speaker(name, tmp_path):
    write, listed, _, prefix = CORPORA[name]
    utterances = listed(write(tmp_path / name))
    assert Counter(utterance.emo for utterance in utterances) == dict.fromkeys(LABELS, 15)
    assert len({utterance.speaker for utterance in utterances}) == 5
    assert all(utterance.utt_id.startswith(prefix) and utterance.wav.is_file() for utterance in utterances)


@pytest.mark.parametrize("name", CORPORA)
def test_preparing_needs_the_folder_above_only(name, tmp_path):
    write, _, prepare, _ = CORPORA[name]
    write(tmp_path / name)
    prepare(tmp_path, tmp_path / "m", {"train": 0.8, "valid": 0.2})
    assert [len(read_manifest(tmp_path / "m" / f"{split}.json")) for split in ("train", "valid")] == [48, 12]


def test_ids_of_the_corpora_never_meet(tmp_path):
    ids = [u.utt_id for name, (write, listed, *_) in CORPORA.items() for u in listed(write(tmp_path / name))]
    assert len(set(ids)) == len(ids) == 180


def test_ravdess_names_give_emotion_and_actor(tmp_path):
    for emotion, actor in (("01", "01"), ("03", "02"), ("04", "23"), ("05", "24")):
        touch(tmp_path / f"Actor_{actor}" / f"03-01-{emotion}-02-02-01-{actor}.flac")
    assert found(list_ravdess(tmp_path)) == {
        "rav-03-01-01-02-02-01-01": ("neutral", "01"),
        "rav-03-01-03-02-02-01-02": ("happy", "02"),
        "rav-03-01-04-02-02-01-23": ("sad", "23"),
        "rav-03-01-05-02-02-01-24": ("angry", "24"),
    }


def test_ravdess_leaves_out_calm_fearful_disgust_surprised_and_hidden_twins(tmp_path):
    for emotion in ("02", "05", "06", "07", "08"):
        touch(tmp_path / "Actor_01" / f"03-01-{emotion}-01-01-01-01.wav")
    touch(tmp_path / "Actor_01" / "._03-01-05-01-01-01-01.wav")
    assert list(found(list_ravdess(tmp_path))) == ["rav-03-01-05-01-01-01-01"]


@pytest.mark.parametrize(("name", "says"), [("notes.txt", "not a RAVDESS name"), ("03-01-09-01-01-01-01.wav", "'09'")])
def test_a_strange_ravdess_file_is_one_error_naming_it(tmp_path, name, says):
    touch(tmp_path / "Actor_01" / name)
    with pytest.raises(CorpusError, match=says) as error:
        list_ravdess(tmp_path)
    assert str(tmp_path / "Actor_01" / name) in str(error.value)


def test_emodb_names_give_emotion_and_speaker(tmp_path):
    for name in ("03a01Wa", "08b02Fb", "10a04Na", "16b10Tc", "09a07La", "11a05Ea", "12b03Aa"):
        touch(tmp_path / "wav" / f"{name}.wav")
    assert found(list_emodb(tmp_path)) == {
        "emodb-03a01Wa": ("angry", "03"),
        "emodb-08b02Fb": ("happy", "08"),
        "emodb-10a04Na": ("neutral", "10"),
        "emodb-16b10Tc": ("sad", "16"),
    }


@pytest.mark.parametrize(("name", "says"), [("03a01Wab.wav", "not an EmoDB name"), ("03a01Xa.wav", "'X'")])
def test_a_strange_emodb_file_is_one_error_naming_it(tmp_path, name, says):
    touch(tmp_path / "wav" / name)
    with pytest.raises(CorpusError, match=says) as error:
        list_emodb(tmp_path)
    assert str(tmp_path / "wav" / name) in str(error.value)


def nemo_tree(root, *rows, columns=("file_id", "emotion", "speaker_id")):
    (root / "samples").mkdir(parents=True, exist_ok=True)
    (root / "data.tsv").write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    return root


def test_nemo_labels_come_from_the_table(tmp_path):
    codes = ("anger", "happiness", "neutral", "sadness", "fear", "surprise")
    nemo_tree(tmp_path, *((f"SM0_{code}_{number}.wav", code, "SM0") for number, code in enumerate(codes)))
    assert found(list_nemo(tmp_path)) == {
        "nemo-SM0_anger_0": ("angry", "SM0"),
        "nemo-SM0_happiness_1": ("happy", "SM0"),
        "nemo-SM0_neutral_2": ("neutral", "SM0"),
        "nemo-SM0_sadness_3": ("sad", "SM0"),
    }


def test_nemo_recordings_may_have_another_file_ending_than_the_table_says(tmp_path):
    nemo_tree(tmp_path, ("SM0_anger_1.wav", "anger", "SM0"))
    touch(tmp_path / "samples" / "SM0_anger_1.flac")
    assert [utterance.wav.name for utterance in list_nemo(tmp_path)] == ["SM0_anger_1.flac"]


def test_a_nemo_row_without_recording_is_left_out_and_listed(tmp_path, no_corpora):
    root = write_nemo(tmp_path / "nemo", takes=1)
    (root / "samples" / "IC0_anger_1.wav").unlink()
    prepare_nemo(root, tmp_path / "m", WHOLE)
    assert len(read_manifest(tmp_path / "m" / "all.json")) == 19
    assert list(json.loads((tmp_path / "m" / "skipped.json").read_text())) == ["nemo-IC0_anger_1"]


def test_an_unknown_nemo_emotion_is_one_error_naming_table_file_and_label(tmp_path):
    nemo_tree(tmp_path, ("SM0_joy_1.wav", "joy", "SM0"))
    with pytest.raises(CorpusError, match=r"data.tsv, SM0_joy_1.wav: unknown label 'joy'"):
        list_nemo(tmp_path)


@pytest.mark.parametrize(
    ("columns", "row"),
    [(("file_id", "emotion"), ("a.wav", "anger")), (("file_id", "emotion", "speaker_id"), ("a.wav", "anger"))],
)
def test_a_nemo_table_that_lacks_a_column_or_a_cell_is_one_error_naming_it(tmp_path, columns, row):
    nemo_tree(tmp_path, row, columns=columns)
    with pytest.raises(CorpusError, match=r"data.tsv: lacks file_id, emotion or speaker_id"):
        list_nemo(tmp_path)


def stated(module, counts, pattern):
    """Whether a module's docstring gives these counts in its own words."""
    return " ".join(pattern.format(**counts).split()) in " ".join(module.__doc__.split())


def test_real_ravdess_has_the_counts_that_its_module_states(real_corpora):
    counts = Counter(utterance.emo for utterance in list_ravdess(real_corpora / "ravdess"))
    assert stated(ravdess, counts, "neutral {neutral}, happy {happy}, sad {sad}, angry {angry} = 672 clips")
    assert sum(counts.values()) == 672


def test_real_emodb_has_the_counts_that_its_module_states(real_corpora):
    counts = Counter(utterance.emo for utterance in list_emodb(real_corpora / "emodb_2s"))
    assert stated(emodb, counts, "W anger {angry}, F happiness {happy}, N neutral {neutral}, T sadness {sad}")
    assert sum(counts.values()) == 339


def test_real_nemo_has_the_speakers_that_its_module_states(real_corpora):
    utterances = list_nemo(real_corpora / "nemo")
    assert {utterance.speaker for utterance in utterances} == set(nemo.SPEAKERS)
    assert {utterance.emo for utterance in utterances} == set(LABELS)


@pytest.mark.parametrize(("name", "count", "copies"), [("ravdess", 671, 1), ("nemo", 1799, 0), ("emodb_2s", 339, 0)])
def test_real_corpora_are_prepared_whole_but_for_one_true_copy(name, count, copies, real_corpora, tmp_path):
    CORPORA[name][2](real_corpora, tmp_path, {"adapt": 0.6, "test": 0.4})
    splits = [read_manifest(tmp_path / f"{split}.json") for split in ("adapt", "test")]
    assert sum(map(len, splits)) == count
    assert not {row["speaker"] for row in splits[0].values()} & {row["speaker"] for row in splits[1].values()}
    assert all({row["emo"] for row in split.values()} == set(LABELS) for split in splits)
    skipped = json.loads((tmp_path / "skipped.json").read_text())
    assert len(skipped) == copies
    if copies:
        assert list(skipped) == ["rav-03-01-03-01-02-02-07"] and "is a copy of" in skipped["rav-03-01-03-01-02-02-07"]
