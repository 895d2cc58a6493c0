"""Each corpus: file names parsed, classes mapped, and the true releases counted."""

import json
from collections import Counter
from pathlib import Path

import pytest
from toy_corpora import (
    MACOS_TWIN,
    utterance,
    write_crema_d,
    write_emodb,
    write_iemocap,
    write_msp_improv,
    write_msp_podcast,
    write_nemo,
    write_ravdess,
    write_text,
    write_wav,
)

from speechbrain_mifuse.corpora import emodb, iemocap, msp_improv, nemo, ravdess
from speechbrain_mifuse.corpora.crema_d import list_crema_d, prepare_crema_d
from speechbrain_mifuse.corpora.emodb import list_emodb, prepare_emodb
from speechbrain_mifuse.corpora.folder import list_folder, prepare_folder
from speechbrain_mifuse.corpora.iemocap import facts, list_iemocap, prepare_iemocap
from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError, Utterance, read_manifest, unlabelled
from speechbrain_mifuse.corpora.msp_improv import list_msp_improv, prepare_msp_improv
from speechbrain_mifuse.corpora.msp_podcast import list_msp_podcast, prepare_msp_podcast
from speechbrain_mifuse.corpora.nemo import list_nemo, prepare_nemo
from speechbrain_mifuse.corpora.ravdess import list_ravdess, prepare_ravdess

WHOLE = {"all": 1.0}
CORPORA = {
    "ravdess": (write_ravdess, list_ravdess, prepare_ravdess, "rav-"),
    "nemo": (write_nemo, list_nemo, prepare_nemo, "nemo-"),
    "emodb_2s": (write_emodb, list_emodb, prepare_emodb, "emodb-"),
    "CREMA-D": (write_crema_d, list_crema_d, prepare_crema_d, "crema-"),
}
PAPER = {
    "IEMOCAP_full_release": (write_iemocap, list_iemocap, prepare_iemocap, "iem-"),
    "MSP-IMPROV": (write_msp_improv, list_msp_improv, prepare_msp_improv, "imp-"),
    "MSP-PODCAST-Publish-1.12": (write_msp_podcast, list_msp_podcast, prepare_msp_podcast, "msp-"),
}
SHARES = {"adapt": 0.6, "test": 0.4}
PARTITIONS = {"adapt": ["Development"], "test": ["Test1"]}
SPLITS = {name: PARTITIONS if "PODCAST" in name else SHARES for name in PAPER}


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
    corpora = {**CORPORA, **PAPER}
    ids = [u.utt_id for name, (write, listed, *_) in corpora.items() for u in listed(write(tmp_path / name))]
    assert len(set(ids)) == len(ids) == 240 + 80 + 96 + 80


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


OWN_FILES = {
    "ravdess": ("Actor_01", "03-01-09-01-01-01-01", list_ravdess),
    "nemo": None,
    "emodb_2s": ("wav", "03a01Xa", list_emodb),
    "CREMA-D": ("AudioWAV", "1001_DFA_JOY_XX", list_crema_d),
}
# What systems, downloads and people leave beside recordings.
LITTER = ("Thumbs.db", "desktop.ini", ".DS_Store", "._{name}", "Icon\r", "{name}:Zone.Identifier", "notes.txt")
NAMED = [name for name in OWN_FILES if OWN_FILES[name]]


@pytest.mark.parametrize("name", NAMED)
def test_litter_beside_recordings_is_never_taken_for_one_and_needs_no_word(name, tmp_path, caplog):
    write, listed, _, _ = CORPORA[name]
    expected = listed(write(tmp_path / name))
    for wav in {u.wav for u in expected}:
        for litter in LITTER:
            touch(wav.parent / litter.format(name=wav.name))
        touch(tmp_path / name / "__MACOSX" / wav.parent.name / f"._{wav.name}")
    assert listed(tmp_path / name) == expected and not caplog.text


@pytest.mark.parametrize("name", NAMED)
def test_a_few_audio_files_with_other_names_are_counted_and_take_no_part(name, tmp_path, caplog):
    write, listed, _, _ = CORPORA[name]
    folder, strange, _ = OWN_FILES[name]
    expected = listed(write(tmp_path / name))
    for other in (f"{strange}.wav", f"{expected[0].wav.stem} (1).wav", "practice.wav"):
        touch(tmp_path / name / folder / other)
    assert listed(tmp_path / name) == expected
    assert f"3 of {len(expected) + 3} audio files are not named as this corpus's recordings" in caplog.text


@pytest.mark.parametrize("name", NAMED)
def test_a_folder_in_which_most_files_have_other_names_is_one_error_naming_the_first(name, tmp_path):
    folder, strange, listed = OWN_FILES[name]
    touch(tmp_path / folder / f"{strange}.wav")
    with pytest.raises(CorpusError, match=r"1 of 1 audio files are not named .*--data_folder") as error:
        listed(tmp_path)
    assert str(tmp_path / folder / f"{strange}.wav") in str(error.value)


def test_song_and_the_sound_of_videos_beside_ravdess_speech_take_no_part(tmp_path, caplog):
    expected = list_ravdess(write_ravdess(tmp_path))
    for name in ("03-02-05-01-01-01-01.wav", "01-01-05-01-01-01-01.wav", "02-01-05-01-01-01-01.mp4"):
        touch(tmp_path / "Actor_01" / name)
        touch(tmp_path / "Audio_Song_Actors_01-24" / "Actor_01" / name)
    with caplog.at_level("INFO"):
        assert list_ravdess(tmp_path) == expected
    assert "4 files of other parts of the release take no part" in caplog.text and "not named" not in caplog.text


def test_a_doubled_ravdess_tree_gives_each_clip_once(tmp_path, caplog, no_corpora):
    root = write_ravdess(tmp_path / "ravdess")
    expected = list_ravdess(root)
    write_ravdess(root / "audio_speech_actors_01-24")
    assert list_ravdess(root) == expected
    assert "60 recordings are there a second time" in caplog.text
    write_ravdess(tmp_path / "other" / "RAVDESS" / "Audio_Speech_Actors_01-24")
    prepare_ravdess(tmp_path / "other", tmp_path / "m", WHOLE)
    assert len(read_manifest(tmp_path / "m" / "all.json")) == 60


def test_all_emodb_letters_are_known_and_what_lies_beside_wav_is_not_read(tmp_path, caplog):
    for letter in "WLEAFTN":
        touch(tmp_path / "wav" / f"03a01{letter}a.wav")
        for folder in ("lablaut", "labsilb", "silb"):
            touch(tmp_path / folder / f"03a01{letter}a.{folder}")
    for name in ("erkennung.txt", "erklaerung.txt"):
        touch(tmp_path / name)
    with caplog.at_level("INFO"):
        assert len(list_emodb(tmp_path)) == 4
    assert "3 recordings of other classes take no part: bored 1, disgust 1, fearful 1" in caplog.text
    assert len(list_emodb(tmp_path, emodb.SEVEN_CLASSES)) == 7


def test_crema_d_in_other_formats_beside_audiowav_is_not_read(tmp_path):
    expected = list_crema_d(write_crema_d(tmp_path))
    touch(tmp_path / "AudioMP3" / "1001_DFA_ANG_XX.mp3")
    touch(tmp_path / "VideoFlash" / "1001_DFA_ANG_XX.flv")
    assert list_crema_d(tmp_path) == expected


def test_emodb_names_give_emotion_and_speaker(tmp_path):
    for name in ("03a01Wa", "08b02Fb", "10a04Na", "16b10Tc", "09a07La", "11a05Ea", "12b03Aa"):
        touch(tmp_path / "wav" / f"{name}.wav")
    assert found(list_emodb(tmp_path)) == {
        "emodb-03a01Wa": ("angry", "03"),
        "emodb-08b02Fb": ("happy", "08"),
        "emodb-10a04Na": ("neutral", "10"),
        "emodb-16b10Tc": ("sad", "16"),
    }


def nemo_tree(root, *rows, columns=("file_id", "emotion", "speaker_id")):
    (root / "samples").mkdir(parents=True, exist_ok=True)
    (root / "data.tsv").write_text("\n".join("\t".join(row) for row in (columns, *rows)) + "\n", encoding="utf-8")
    return root


def test_nemo_labels_come_from_the_table(tmp_path):
    codes = ("anger", "happiness", "neutral", "sadness", "fear", "surprised")
    nemo_tree(tmp_path, *((f"SM0_{code}_{number}.wav", code, "SM0") for number, code in enumerate(codes)))
    assert len({u.emo for u in list_nemo(tmp_path, nemo.SIX_CLASSES)}) == 6
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
    with pytest.raises(CorpusError, match=r"data.tsv, line 2 \(SM0_joy_1.wav\): unknown label 'joy'"):
        list_nemo(tmp_path)


@pytest.mark.parametrize(
    ("columns", "row"),
    [(("file_id", "emotion"), ("a.wav", "anger")), (("file_id", "emotion", "speaker_id"), ("a.wav", "anger"))],
)
def test_a_nemo_table_that_lacks_a_column_or_a_cell_is_one_error_naming_it(tmp_path, columns, row):
    nemo_tree(tmp_path, row, columns=columns)
    with pytest.raises(CorpusError, match=r"data.tsv.*lacks .*file_id, emotion.*speaker_id"):
        list_nemo(tmp_path)


def about(folder):
    return json.loads((folder / "corpus.json").read_text())


def speakers_of(folder, split):
    return {row["speaker"] for row in read_manifest(folder / f"{split}.json").values()}


# The corpora of the paper.


@pytest.mark.parametrize("name", PAPER)
def test_a_small_tree_of_a_licensed_release_gives_every_class(name, tmp_path):
    write, listed, _, prefix = PAPER[name]
    utterances = listed(write(tmp_path / name))
    assert len(set(Counter(utterance.emo for utterance in utterances).values())) == 1
    assert {utterance.emo for utterance in utterances} == set(LABELS)
    assert all(utterance.utt_id.startswith(prefix) and utterance.wav.is_file() for utterance in utterances)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("given", ["itself", "above"])
def test_a_licensed_release_is_found_as_itself_or_in_the_folder_above(name, given, tmp_path, no_corpora):
    write, _, prepare, _ = PAPER[name]
    root = write(tmp_path / name)
    prepare(root if given == "itself" else tmp_path, tmp_path / "m", SPLITS[name])
    assert about(tmp_path / "m")["data_root"] == str(root)
    assert json.loads((tmp_path / "m" / "skipped.json").read_text()) == {}


@pytest.mark.parametrize("name", [*PAPER, "CREMA-D"])
def test_a_folder_that_is_not_the_corpus_is_one_error_naming_the_flag_and_what_is_looked_for(
    name, tmp_path, no_corpora
):
    (tmp_path / "other" / "wav").mkdir(parents=True)
    prepare, splits = {**PAPER, **CORPORA}[name][2], SPLITS.get(name, SHARES)
    with pytest.raises(CorpusError, match=r"not found \(a folder that holds .*--data_folder.*--source_data_folder"):
        prepare(tmp_path / "other", tmp_path / "m", splits)


@pytest.mark.parametrize("name", PAPER)
def test_files_that_macos_leaves_beside_others_are_not_read(name, tmp_path):
    write, listed, _, _ = PAPER[name]
    root = write(tmp_path / name)
    expected = listed(root)
    for path in [path for path in root.rglob("*.*") if path.is_file() and not path.name.startswith(".")]:
        (path.parent / f"._{path.name}").write_bytes(MACOS_TWIN)
    assert listed(root) == expected


def test_the_speaker_of_an_iemocap_turn_is_that_of_the_turn_and_not_of_the_dialogue(tmp_path):
    utterances = {u.utt_id: u for u in list_iemocap(write_iemocap(tmp_path))}
    turn = utterances["iem-Ses01F_impro01_M000"]
    assert (turn.emo, turn.speaker, turn.session) == ("angry", "Ses01M", "Ses01")
    assert utterances["iem-Ses05F_impro01_F000"].speaker == "Ses05F"
    assert len({u.speaker for u in utterances.values()}) == 10


def test_excited_counts_as_happy_and_other_iemocap_classes_take_no_part(tmp_path):
    root = write_iemocap(tmp_path, sessions=[1])
    codes = [line.split("\t")[2] for line in next(root.rglob("Ses*.txt")).read_text().splitlines() if line[:1] == "["]
    assert {"exc", "hap", "fru"} <= set(codes)
    counts = Counter(utterance.emo for utterance in list_iemocap(root))
    assert counts["happy"] == codes.count("exc") + codes.count("hap")
    assert sum(counts.values()) == len(codes) - codes.count("fru")


def test_iemocap_sessions_stay_together_and_the_rows_name_them(tmp_path):
    prepare_iemocap(write_iemocap(tmp_path / "IEMOCAP_full_release"), tmp_path / "m", SHARES)
    assert about(tmp_path / "m")["sessions"] == {"adapt": ["Ses01", "Ses02", "Ses03"], "test": ["Ses04", "Ses05"]}
    assert speakers_of(tmp_path / "m", "test") == {"Ses04F", "Ses04M", "Ses05F", "Ses05M"}
    rows = read_manifest(tmp_path / "m" / "test.json")
    assert all(row["session"] == key[4:9] for key, row in rows.items())


@pytest.mark.parametrize(
    ("line", "says"),
    [("[0.0 - 1.0]\tSes01F_impro01_F000\tjoy\t[2.5, 2.5, 2.5]", "'joy'"), ("[0.0 - 1.0]\tSes01F", "not a turn")],
)
def test_a_strange_iemocap_line_is_one_error_naming_file_and_line(line, says, tmp_path):
    table = tmp_path / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    write_text(table, f"% header\n\n{line}\n")
    with pytest.raises(CorpusError, match=says) as error:
        list_iemocap(tmp_path)
    assert f"{table}, line 3" in str(error.value)


def whole_iemocap(root, counts):
    """Label files with these counts by session and no recording."""
    for session, count in counts.items():
        lines = [f"[0.0 - 1.0]\tSes0{session}F_impro01_F{n:03d}\tneu\t[2.5, 2.5, 2.5]" for n in range(count)]
        tables = root / f"Session{session}" / "dialog" / "EmoEvaluation"
        write_text(tables / f"Ses0{session}F_impro01.txt", "\n".join(lines))
    return list_iemocap(root)


def test_the_published_iemocap_counts_match_and_one_turn_less_does_not(tmp_path, caplog):
    folds = dict(enumerate((1085, 1023, 1151, 1031, 1241), start=1))
    assert sum(folds.values()) == 5531
    assert facts(tmp_path, whole_iemocap(tmp_path / "whole", folds))["release_check"]["matches"]
    assert not caplog.text
    found = facts(tmp_path, whole_iemocap(tmp_path / "less", {**folds, 3: 1150}))["release_check"]
    assert not found["matches"] and found["found"]["Ses03"] == 1150
    assert "5531 utterances expected, 5530 found" in caplog.text and "Ses03: expected 1151, found 1150" in caplog.text


def test_an_iemocap_copy_that_differs_is_told_at_every_run_also_when_nothing_is_prepared(tmp_path, caplog):
    root = write_iemocap(tmp_path / "IEMOCAP_full_release")
    for _ in range(2):
        caplog.clear()
        prepare_iemocap(root, tmp_path / "m", SHARES)
        assert "not the published release" in caplog.text
    assert about(tmp_path / "m")["release_check"]["total_found"] == 80


def test_an_iemocap_turn_without_recording_is_left_out_and_listed(tmp_path):
    root = write_iemocap(tmp_path / "IEMOCAP_full_release")
    next(root.rglob("Ses01F_impro01_F000.wav")).unlink()
    prepare_iemocap(root, tmp_path / "m", SHARES)
    assert list(json.loads((tmp_path / "m" / "skipped.json").read_text())) == ["iem-Ses01F_impro01_F000"]


def whole_release(name, root, monkeypatch):
    """A small tree whose labels have the published counts."""
    monkeypatch.setattr(iemocap, "SESSIONS", {f"Ses0{number}": 16 for number in range(1, 6)})
    monkeypatch.setattr(msp_improv, "COUNTS", dict.fromkeys(LABELS, 24))
    return PAPER[name][0](root / name)


CHECKED = ("IEMOCAP_full_release", "MSP-IMPROV")


@pytest.mark.parametrize("name", CHECKED)
def test_a_whole_release_matches_and_nothing_is_said(name, tmp_path, monkeypatch, caplog):
    PAPER[name][2](whole_release(name, tmp_path, monkeypatch), tmp_path / "m", SHARES)
    check = about(tmp_path / "m")["release_check"]
    assert check["matches"] is True and check["unusable"] == 0 and not caplog.text


@pytest.mark.parametrize("name", CHECKED)
def test_a_release_whose_labels_are_whole_and_whose_recordings_are_not_does_not_match(
    name, tmp_path, monkeypatch, caplog
):
    root, prepare = whole_release(name, tmp_path, monkeypatch), PAPER[name][2]
    wavs = [u.wav for u in PAPER[name][1](root)]
    kept = {wav: wav.read_bytes() for wav in wavs[:15]}
    for wav in wavs[:14]:
        wav.unlink()
    wavs[14].write_bytes(b"")
    # The second time the manifests are there already.
    for _ in range(2):
        caplog.clear()
        prepare(root, tmp_path / "m", SHARES)
        check = about(tmp_path / "m")["release_check"]
        assert check["matches"] is False and check["unusable"] == 15
        assert check["total_expected"] == check["total_found"] == len(wavs)
        said = [record.getMessage() for record in caplog.records if "published" in record.getMessage()]
        assert len(said) == 1 and "15 utterances cannot be used" in said[0]
        assert str(tmp_path / "m" / "skipped.json") in said[0]
    # What the message asks for.
    for wav, content in kept.items():
        wav.write_bytes(content)
    (tmp_path / "m" / "corpus.json").unlink()
    prepare(root, tmp_path / "m", SHARES)
    assert about(tmp_path / "m")["release_check"]["matches"] is True


@pytest.mark.parametrize("table", ["Evalution.txt", "Evaluation.txt"])
@pytest.mark.parametrize("audio", ["", "Audio"])
def test_msp_improv_copies_differ_in_spelling_and_place(table, audio, tmp_path):
    root = write_msp_improv(tmp_path / "MSP-IMPROV", table=table, audio=audio)
    utterances = list_msp_improv(root)
    assert len(utterances) == 96 and all(utterance.wav.is_file() for utterance in utterances)


def test_msp_improv_labels_of_videos_give_emotion_speaker_and_session_of_recordings(tmp_path):
    utterances = {u.utt_id: u for u in list_msp_improv(write_msp_improv(tmp_path))}
    turn = utterances["imp-S01H-M03-P-MM02"]
    assert (turn.emo, turn.speaker, turn.session) == ("happy", "M03", "session3")
    assert turn.wav == tmp_path / "session3" / "S01H" / "P" / "MSP-IMPROV-S01H-M03-P-MM02.wav"
    assert len({u.speaker for u in utterances.values()}) == 12


def test_msp_improv_sessions_stay_together(tmp_path):
    prepare_msp_improv(write_msp_improv(tmp_path / "MSP-IMPROV"), tmp_path / "m", {"train": 0.8, "valid": 0.2})
    assert about(tmp_path / "m")["sessions"]["valid"] == ["session6"]
    assert speakers_of(tmp_path / "m", "valid") == {"F06", "M06"}


def test_msp_improv_counts_are_compared_with_those_commonly_cited(tmp_path, caplog):
    assert sum(msp_improv.COUNTS.values()) == 7798
    prepare_msp_improv(write_msp_improv(tmp_path / "MSP-IMPROV"), tmp_path / "m", SHARES)
    check = about(tmp_path / "m")["release_check"]
    assert check["expected"] == {"angry": 792, "happy": 2644, "neutral": 3477, "sad": 885}
    assert check["found"] == dict.fromkeys(LABELS, 24) and not check["matches"]
    assert "7798 utterances expected, 96 found" in caplog.text


@pytest.mark.parametrize(
    ("line", "says"),
    [("UTD-IMPROV-S01A-F01-P-FM01.avi; Q; A:2.8;", "'Q'"), ("UTD-IMPROV-S01A.avi; N; A:2.8;", "not a turn")],
)
def test_a_strange_msp_improv_line_is_one_error_naming_file_and_line(line, says, tmp_path):
    write_text(tmp_path / "Evalution.txt", f"\n{line}\n")
    with pytest.raises(CorpusError, match=says) as error:
        list_msp_improv(tmp_path)
    assert f"{tmp_path / 'Evalution.txt'}, line 2" in str(error.value)


def test_two_msp_improv_label_files_are_an_error(tmp_path):
    for table in ("Evalution.txt", "Evaluation.txt"):
        write_text(tmp_path / table, "")
    with pytest.raises(CorpusError, match="holds 2 files"):
        list_msp_improv(tmp_path)


def test_msp_podcast_rows_give_partition_and_test3_and_other_classes_are_left_out(tmp_path):
    utterances = list_msp_podcast(write_msp_podcast(tmp_path))
    assert Counter(u.partition for u in utterances) == {"Train": 40, "Development": 16, "Test1": 16, "Test2": 8}
    assert not {u.utt_id for u in utterances} & {"msp-MSP-PODCAST_9000_0000", "msp-MSP-PODCAST_9100_0000"}


@pytest.mark.parametrize("audio", ["Audio", "Audios"])
def test_msp_podcast_recordings_lie_in_either_folder(audio, tmp_path):
    assert all(u.wav.is_file() for u in list_msp_podcast(write_msp_podcast(tmp_path, audio=audio)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", PAPER)
def test_a_side_file_of_the_same_name_takes_no_recordings_place_in_whatever_order_a_folder_is_read(
    name, first, tmp_path, monkeypatch
):
    write, listed, *_ = PAPER[name]
    root = write(tmp_path / name)
    wanted = [(u.utt_id, u.wav) for u in listed(root)]
    for path in {wav for _, wav in wanted}:
        path.with_suffix(".txt").write_text("words")
        path.with_suffix(".flac").write_text("a copy")
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern), reverse=first))
    assert [(u.utt_id, u.wav) for u in listed(root)] == wanted


def test_recordings_that_are_missing_are_told_at_every_run_and_counted(tmp_path, caplog):
    root = write_msp_podcast(tmp_path / "MSP-Podcast-1.11")
    list_msp_podcast(root)[0].wav.unlink()
    for _ in range(2):
        caplog.clear()
        prepare_msp_podcast(root, tmp_path / "m", {"adapt": ["Train"], "test": ["Test1"]})
        assert "msp_podcast: 1 utterances cannot be used" in caplog.text
    assert about(tmp_path / "m")["unusable"] == 1


@pytest.mark.parametrize("content", [b"FileName,EmoClass\n\xff.wav,A\n", "FileName".encode("utf-16")[:-1]])
def test_a_damaged_table_of_labels_is_one_error_naming_it(content, tmp_path):
    for table, listed in (("Labels/labels_consensus.csv", list_msp_podcast), ("data.tsv", list_nemo)):
        path = tmp_path / table
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=f"{path.name}: cannot be read"):
            listed(tmp_path)


def test_a_path_in_the_table_is_but_a_name(tmp_path):
    rows = "FileName,EmoClass,SpkrID,Split_Set\n/elsewhere/a.wav,A,1,Train\n../b.wav,A,1,Train\n"
    (tmp_path / "Labels").mkdir()
    (tmp_path / "Labels" / "labels_consensus.csv").write_text(rows)
    assert [u.wav for u in list_msp_podcast(tmp_path)] == [tmp_path / "Audios" / name for name in ("a.wav", "b.wav")]


def test_a_mark_of_the_byte_order_hides_no_turn_of_msp_improv(tmp_path):
    line = "UTD-IMPROV-S01A-F01-P-FM01.avi; N; A:2.8; V:3.0; D:3.2 ; N:3.9;"
    (tmp_path / "Evalution.txt").write_bytes(line.encode("utf-8-sig"))
    assert [u.emo for u in list_msp_improv(tmp_path)] == ["neutral"]


def test_unknown_msp_podcast_speakers_are_one_each_and_join_no_splits(tmp_path):
    root = write_msp_podcast(tmp_path / "MSP-Podcast-1.11")
    prepare_msp_podcast(root, tmp_path / "m", PARTITIONS)
    unknown = [u for u in list_msp_podcast(root) if u.speaker.startswith("unknown-")]
    assert len({u.speaker for u in unknown}) == len(unknown) == 4
    counts = about(tmp_path / "m")["counts"]
    assert counts == {"adapt": dict.fromkeys(LABELS, 4), "test": dict.fromkeys(LABELS, 4)}
    assert about(tmp_path / "m")["unknown_speakers"] == 4 and about(tmp_path / "m")["shared_speakers_left_out"] == 0


def test_an_msp_podcast_speaker_in_two_splits_is_left_out_of_the_earlier_one_and_counted(tmp_path, caplog):
    root = write_msp_podcast(tmp_path / "MSP-Podcast-1.11")
    table = root / "Labels" / "labels_consensus.csv"
    text = table.read_text()
    assert text.count(",6,Female,Development") == 8
    table.write_text(text.replace(",6,Female,Development", ",8,Female,Development"))
    prepare_msp_podcast(root, tmp_path / "m", PARTITIONS)
    assert "8" in speakers_of(tmp_path / "m", "test") and "8" not in speakers_of(tmp_path / "m", "adapt")
    assert len(read_manifest(tmp_path / "m" / "test.json")) == 16
    assert len(read_manifest(tmp_path / "m" / "adapt.json")) == 8
    assert about(tmp_path / "m")["shared_speakers_left_out"] == 8
    assert "its speaker 8 is also in split 'test'" in caplog.text
    assert len(json.loads((tmp_path / "m" / "skipped.json").read_text())) == 8


def test_the_msp_podcast_release_and_its_counts_are_recorded(tmp_path):
    for folder, release in (("MSP-PODCAST-Publish-1.12", "1.12"), ("MSP-Podcast", None)):
        prepare_msp_podcast(write_msp_podcast(tmp_path / folder), tmp_path / "m" / folder, PARTITIONS)
        found = about(tmp_path / "m" / folder)
        assert found["release"] == release
        assert found["partition_counts"]["Train"] == dict.fromkeys(LABELS, 10)


def test_two_releases_in_one_folder_are_an_error_that_asks_which(tmp_path, no_corpora):
    for release in ("1.11", "1.12"):
        write_text(tmp_path / f"MSP-PODCAST-Publish-{release}" / "Labels" / "labels_consensus.csv", "")
    with pytest.raises(CorpusError, match=r"more than once \(MSP-PODCAST-Publish-1.11, .*--data_folder"):
        prepare_msp_podcast(tmp_path, tmp_path / "m", PARTITIONS)


@pytest.mark.parametrize(
    ("header", "row", "says"),
    [
        ("FileName,EmoClass,SpkrID", "a.wav,A,1", "lacks one of"),
        (None, "a.wav,Q,1,Train", r"line 2 \(a.wav\): unknown label 'Q'"),
    ],
)
def test_a_strange_msp_podcast_table_is_one_error_naming_it(header, row, says, tmp_path):
    table = tmp_path / "Labels" / "labels_consensus.csv"
    write_text(table, f"{header or 'FileName,EmoClass,SpkrID,Split_Set'}\n{row}\n")
    with pytest.raises(CorpusError, match=says) as error:
        list_msp_podcast(tmp_path)
    assert str(table) in str(error.value)


def test_crema_d_names_give_emotion_and_actor(tmp_path):
    for name in ("1001_DFA_ANG_XX", "1002_IEO_HAP_HI", "1090_IEO_SAD_LO", "1091_ITH_NEU_XX", "1001_DFA_DIS_XX"):
        touch(tmp_path / "AudioWAV" / f"{name}.wav")
    touch(tmp_path / "AudioWAV" / "._1001_DFA_ANG_XX.wav")
    assert found(list_crema_d(tmp_path)) == {
        "crema-1001_DFA_ANG_XX": ("angry", "1001"),
        "crema-1002_IEO_HAP_HI": ("happy", "1002"),
        "crema-1090_IEO_SAD_LO": ("sad", "1090"),
        "crema-1091_ITH_NEU_XX": ("neutral", "1091"),
    }


# A folder of recordings.


def write_folder(root, *paths):
    for number, path in enumerate(paths):
        write_wav(root / path, utterance(LABELS[number % 4], number, 1))
    return root


def test_an_unlabelled_folder_is_wholly_adapted_to_and_wholly_predicted(tmp_path):
    root = write_folder(tmp_path / "mine", "a.wav", "b.flac", "monday/a.wav", "monday/deep/down/c.wav")
    write_text(root / "notes.txt", "no recording")
    write_text(root / ".hidden" / "d.wav", "no recording")
    prepare_folder(root, tmp_path / "m", SHARES)
    adapt, test = (read_manifest(tmp_path / "m" / f"{split}.json") for split in SHARES)
    assert adapt == test == read_manifest(unlabelled(tmp_path / "m" / "test.json"))
    names = ("a.wav", "b.flac", "monday/a.wav", "monday/deep/down/c.wav")
    assert list(adapt) == [f"folder-mine/{name}" for name in names]
    assert not [row for row in adapt.values() if "emo" in row]
    assert about(tmp_path / "m")["labelled"] is False and about(tmp_path / "m")["recordings_without_speaker"] == 4


def test_folders_named_like_labels_give_emotions_and_the_others_speakers(tmp_path, caplog):
    root = tmp_path / "mine"
    write_folder(root, "Angry/anna/1.wav", "sad/bert/1.wav", "happiness/1.wav", "neutral/anna/1.wav", "fear/anna/1.wav")
    write_folder(root, "loose.wav")
    assert found(list_folder(root)) == {
        "folder-mine/Angry/anna/1.wav": ("angry", "anna"),
        "folder-mine/neutral/anna/1.wav": ("neutral", "anna"),
        "folder-mine/happiness/1.wav": ("happy", "unknown-84b9837f757c"),
        "folder-mine/sad/bert/1.wav": ("sad", "bert"),
    }
    assert "1 recordings have no label and take no part (first: loose.wav)" in caplog.text


def test_a_table_gives_emotions_and_speakers(tmp_path, caplog):
    root = write_folder(tmp_path / "mine", "1.wav", "x/2.wav", "3.wav")
    write_text(root / "labels.csv", "file,emo,speaker\n1.wav,Anger,anna\nx/2.wav,sad,\n")
    assert found(list_folder(root)) == {
        "folder-mine/1.wav": ("angry", "anna"),
        "folder-mine/x/2.wav": ("sad", "unknown-7bf1cb8de5c2"),
    }
    assert "1 recordings have no label" in caplog.text


def test_a_table_without_emotions_still_gives_speakers(tmp_path):
    root = write_folder(tmp_path / "mine", "1.wav", "2.wav")
    write_text(root / "labels.csv", "file,emo,speaker\n1.wav,,anna\n2.wav,,bert\n")
    prepare_folder(root, tmp_path / "m", SHARES)
    assert speakers_of(tmp_path / "m", "adapt") == speakers_of(tmp_path / "m", "test") == {"anna", "bert"}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("file,emo\n1.wav,purple\n", "line 2: unknown class 'purple'. Known classes: angry, happy, neutral, sad"),
        ("file,emo\n1.wav,sad\n2.wav,\n", "line 3: 1 of 2 rows have no emo"),
        ("name,emo\n1.wav,sad\n", "first line lacks one of the columns file, emo: 'name,emo'"),
        ("file,emo\n1.wav,sad\n../1.wav,sad\n", "line 3: .* lies outside the folder"),
        ("file,emo\n/1.wav,sad\n", "line 2: .* lies outside the folder"),
        ("file,emo\nC:\\\\data\\\\1.wav,sad\n", "line 2: .* lies outside the folder"),
        ("file,emo\n1.wav,sad\n1.wav,happy\n", "line 3: '1.wav' has other values than in line 2"),
        ("file,emo\n1.wav,sad\n\n2, b.wav,sad\n", "line 4: has 3 values, the header has 2"),
        ('file,emo\n1.wav,sad\n"2.wav,sad\n', "cannot be read .*quotation mark"),
        ("file,emo\n1.wav,sad\n8.wav,sad\n9.wav,sad\n", "2 of the 3 files that it names are not there .*8.wav"),
        ("file,emotion,label\n1.wav,sad,sad\n", "names the column 'emo' twice"),
    ],
)
def test_a_strange_table_is_one_error_naming_it(table, says, tmp_path):
    write_folder(tmp_path, "1.wav", "2.wav")
    write_text(tmp_path / "labels.csv", table)
    with pytest.raises(CorpusError, match=says) as error:
        list_folder(tmp_path)
    assert str(tmp_path / "labels.csv") in str(error.value)


def test_a_labelled_folder_is_split_by_speaker(tmp_path):
    root = write_folder(tmp_path / "mine", *(f"{who}/{emo}/1.wav" for who in "abcde" for emo in LABELS))
    prepare_folder(root, tmp_path / "m", SHARES)
    adapt, test = (speakers_of(tmp_path / "m", split) for split in SHARES)
    assert (len(adapt), len(test)) == (3, 2) and adapt | test == set("abcde")


def test_class_folders_without_speakers_give_every_split_every_class_and_the_same_one_elsewhere(tmp_path):
    for place in ("here", "there"):
        root = tmp_path / place / "mine"
        for number in range(40):
            write_wav(root / LABELS[number // 10] / f"{number}.wav", utterance(LABELS[number // 10], number, 1))
        prepare_folder(root, tmp_path / f"m {place}", SHARES)
    splits = [[set(read_manifest(tmp_path / f"m {p}" / f"{s}.json")) for s in SHARES] for p in ("here", "there")]
    assert splits[0] == splits[1] and [len(split) for split in splits[0]] == [24, 16]
    for split in SHARES:
        counts = about(tmp_path / "m here")["counts"][split]
        # Of ten of each class, split by a hash that knows nothing of classes.
        assert set(counts) == set(LABELS) and min(counts.values()) >= 2


def test_speakers_and_recordings_without_one_are_in_every_split(tmp_path):
    root = write_folder(tmp_path / "mine", *(f"{who}/{emo}/1.wav" for who in "abcde" for emo in LABELS))
    rows = [f"{path.relative_to(root)},{path.parts[-2]},{path.parts[-3]}" for path in sorted(root.rglob("*.wav"))]
    for number in range(20):
        write_wav(root / "loose" / f"{number}.wav", utterance("sad", number, 2))
        rows.append(f"loose/{number}.wav,sad,")
    write_text(root / "labels.csv", "\n".join(["file,emo,speaker", *rows]))
    prepare_folder(root, tmp_path / "m", SHARES)
    assert about(tmp_path / "m")["counts"] == {
        "adapt": {"angry": 3, "happy": 3, "neutral": 3, "sad": 15},
        "test": {"angry": 2, "happy": 2, "neutral": 2, "sad": 10},
    }


def test_labelled_recordings_of_one_speaker_cannot_be_split(tmp_path):
    root = write_folder(tmp_path / "mine", *(f"anna/{emo}/1.wav" for emo in LABELS))
    with pytest.raises(CorpusError, match=r"Cannot deal 1 speakers.*every split needs a speaker of its own"):
        prepare_folder(root, tmp_path / "m", SHARES)


@pytest.mark.parametrize("given", [None, "nowhere", "empty"])
def test_a_folder_is_never_looked_for_elsewhere(given, tmp_path, toy_folder, monkeypatch):
    monkeypatch.setenv("MIFUSE_CORPORA", str(toy_folder))
    (tmp_path / "empty").mkdir()
    write_wav(tmp_path / "other.wav", utterance("sad", 1, 1))
    with pytest.raises(CorpusError, match="--data_folder"):
        prepare_folder(given and tmp_path / given, tmp_path / "m", SHARES)


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


# Sentences.


def sentences_of(folder, split):
    return {utt_id.rsplit("_", 1)[-1] for utt_id in read_manifest(folder / f"{split}.json")}


def test_sentences_apart_leave_nothing_to_test_that_was_adapted_to_and_the_same_ones_are_as_many(tmp_path):
    root = write_nemo(tmp_path / "nemo", takes=4)
    folders = {how: tmp_path / str(how) for how in (None, "apart", "same")}
    for how, folder in folders.items():
        prepare_nemo(root, folder, SHARES, sentences=how)
    assert sentences_of(folders[None], "adapt") == sentences_of(folders[None], "test") == {"1", "2", "3", "4"}
    for how, adapted in (("apart", {"1", "3"}), ("same", {"2", "4"})):
        assert sentences_of(folders[how], "adapt") == adapted and sentences_of(folders[how], "test") == {"2", "4"}
        assert about(folders[how])["sentences"] == how
    # Speakers stay where they were, and the test sets of both are one.
    for split in SHARES:
        assert speakers_of(folders["apart"], split) == speakers_of(folders[None], split)
    tests = [read_manifest(folders[how] / "test.json") for how in ("apart", "same")]
    assert tests[0] == tests[1] and "sentences" not in about(folders[None])


def test_the_sentence_is_read_from_the_names_of_each_acted_corpus(tmp_path):
    def said(corpus, name):
        return corpus.sentence_of(Utterance(name, Path(name), "sad", "1"))

    assert said(emodb.EMODB, "03a01Wa.wav") == said(emodb.EMODB_7, "08a01Fb.wav") == "a01"
    assert said(ravdess.RAVDESS, "03-01-03-01-02-01-12.wav") == "02"
    assert said(nemo.NEMO_6, "nemo-SM0_anger_17") == "17"


@pytest.mark.parametrize(
    ("sentences", "splits", "said"),
    [
        ("aside", SHARES, "sentences: 'aside'; it must be null, or apart or same"),
        ("apart", WHOLE, "there must be two splits"),
    ],
)
def test_an_arm_of_sentences_that_cannot_be_is_one_clear_error(sentences, splits, said, tmp_path):
    with pytest.raises(CorpusError, match=said):
        prepare_nemo(write_nemo(tmp_path / "nemo", takes=2), tmp_path / "m", splits, sentences=sentences)


def test_a_corpus_that_names_no_sentence_or_only_one_has_no_such_arm(tmp_path):
    with pytest.raises(CorpusError, match="file names do not name any"):
        prepare_iemocap(write_iemocap(tmp_path / "iem"), tmp_path / "m", SHARES, sentences="apart")
    with pytest.raises(CorpusError, match="say one sentence"):
        prepare_ravdess(write_ravdess(tmp_path / "rav"), tmp_path / "n", SHARES, sentences="apart")
