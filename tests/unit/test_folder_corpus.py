"""Any folder: what its names, its known layouts and its table say is read, and nothing is guessed."""

import csv
import unicodedata
from collections import Counter

import pytest
from toy_corpora import LABELS, utterance, write_ravdess, write_tess, write_wav

from speechbrain_mifuse.corpora.corpus import find_corpus
from speechbrain_mifuse.corpora.folder import list_folder, prepare_folder
from speechbrain_mifuse.corpora.manifest import CorpusError, Utterance, read_manifest
from speechbrain_mifuse.corpora.splits import balanced_groups, deal

SHARES = {"adapt": 0.6, "test": 0.4}
SPEAKERS = ("anna", "bert", "carl")


def touched(root, *paths):
    """Files without content: enough to be listed."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def labels_and_speakers(root):
    return {(utterance.emo, utterance.speaker if utterance.speaker_known else None) for utterance in list_folder(root)}


# Names of folders.


def test_german_folders_new_and_old_are_no_emotions(tmp_path):
    root = touched(tmp_path, "neu/1.wav", "neu/2.wav", "alt/1.wav")
    assert labels_and_speakers(root) == {(None, "neu"), (None, "alt")}


@pytest.mark.parametrize("names", [("Sad", "Miller", "Jones"), ("angry", "happy", "sad", "misc"), ("happy",)])
def test_folders_of_which_only_some_are_named_like_emotions_are_an_error_that_asks_for_a_table(names, tmp_path):
    root = touched(tmp_path, *(f"{name}/{take}.wav" for name in names for take in "12"))
    with pytest.raises(CorpusError, match=r"labels.csv.*file,emo,speaker") as error:
        list_folder(root)
    assert all(name in str(error.value) for name in names) and str(root) in str(error.value)


def test_names_that_only_contain_emotions_are_an_error_and_not_an_unlabelled_folder(tmp_path):
    root = touched(tmp_path, "01_angry/1.wav", "02_happy/1.wav", "03_sad/1.wav")
    with pytest.raises(CorpusError, match=r"01_angry, 02_happy, 03_sad may be emotions"):
        list_folder(root)


def test_a_table_without_emotions_says_that_folders_named_like_emotions_are_none(tmp_path):
    root = touched(tmp_path, "Sad/1.wav", "Miller/1.wav")
    (root / "labels.csv").write_text("file,emo,speaker\nSad/1.wav,,Sad\nMiller/1.wav,,Miller\n")
    assert labels_and_speakers(root) == {(None, "Sad"), (None, "Miller")}


def test_a_surname_above_a_whole_level_of_emotions_is_a_speaker(tmp_path):
    root = touched(tmp_path, *(f"{who}/{emo}/1.wav" for who in ("Sad", "Miller") for emo in LABELS))
    assert labels_and_speakers(root) == {(emo, who) for who in ("Sad", "Miller") for emo in LABELS}


def test_parts_below_the_emotions_are_no_speakers_so_that_nobody_is_in_two_splits(tmp_path):
    paths = [f"{who}/{emo}/part{part}/1.wav" for who in SPEAKERS for emo in LABELS for part in "12"]
    assert {who for _, who in labels_and_speakers(touched(tmp_path, *paths))} == set(SPEAKERS)


def test_two_levels_that_could_be_speakers_are_an_error_that_names_both(tmp_path):
    paths = [f"{who}/{emo}/{hour}/1.wav" for who in SPEAKERS for emo in LABELS for hour in ("morning", "evening")]
    with pytest.raises(CorpusError, match=r"level 1 \(anna, bert, carl\) and folder level 3 \(evening, morning\)"):
        list_folder(touched(tmp_path, *paths))


def test_two_levels_that_could_be_emotions_are_an_error_that_names_both(tmp_path):
    with pytest.raises(CorpusError, match=r"level 1 .* and folder level 2 .* could both be emotions"):
        list_folder(touched(tmp_path, *(f"{acted}/{perceived}/1.wav" for acted in LABELS for perceived in LABELS)))


def test_emotions_at_two_depths_are_an_error_that_names_a_recording(tmp_path):
    paths = [f"anna/{emo}/{take}.wav" for emo in LABELS for take in range(9)]
    with pytest.raises(CorpusError, match=r"level 2 .* but sad/1.wav has one at another level|look like emotions"):
        list_folder(touched(tmp_path, *paths, "sad/1.wav"))


@pytest.mark.parametrize(
    "names",
    [
        ("Wut", "Freude", "Neutral", "Trauer"),
        ("złość", "radość", "neutralny", "smutek"),
        ("colère", "joie", "neutre", "tristesse"),
        ("ANG", "HAP", "NEU", "SAD"),
        ("生气", "快乐", "中立", "伤心"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_whole_level_of_emotions_in_one_language_is_read_in_any_unicode_form(names, form, tmp_path):
    root = touched(tmp_path, *(unicodedata.normalize(form, f"anna/{name}/1.wav") for name in names))
    assert {emo for emo, _ in labels_and_speakers(root)} == set(LABELS)


def test_other_emotions_are_left_out_with_their_counts_however_many(tmp_path, caplog):
    outside = ("fear", "disgust", "surprised", "Calm", "boredom")
    root = touched(tmp_path, *(f"anna/{name}/{take}.wav" for name in ("angry", "sad", *outside) for take in "12"))
    with caplog.at_level("INFO"):
        assert {emo for emo, _ in labels_and_speakers(root)} == {"angry", "sad"}
    assert "14 recordings, labels from folders: angry 2, sad 2; speakers from folders: 1; left out: 10" in caplog.text
    assert "bored 2, calm 2, disgust 2, fearful 2, surprised 2" in caplog.text


def test_labels_of_few_recordings_are_an_error_where_the_rest_is_most(tmp_path):
    root = touched(tmp_path, "angry/1.wav", "sad/1.wav", *(f"{number}.wav" for number in range(3)))
    with pytest.raises(CorpusError, match=r"would leave out 3 of 5 recordings \(first: 0.wav\).*labels.csv"):
        list_folder(root)


@pytest.mark.parametrize("other", ["Anna", unicodedata.normalize("NFD", "Żaneta")])
def test_one_speaker_in_two_spellings_is_one_speaker(other, tmp_path, caplog):
    name = unicodedata.normalize("NFC", other).lower()
    root = touched(tmp_path, f"angry/{name}/1.wav", f"sad/{other}/1.wav", "sad/bert/1.wav")
    assert len({who for _, who in labels_and_speakers(root)}) == 2
    assert "speakers that differ in spelling alone are one" in caplog.text


# Known corpora.

TREES = {
    "TESS": {
        "TESS/OAF_angry/OAF_back_angry.wav": ("angry", "OAF"),
        "TESS/OAF_neutral/OA_bite_neutral.wav": ("neutral", "OAF"),
        "TESS/YAF_Fear/YAF_back_fear.wav": None,
        "TESS/YAF_happy/YAF_back_happy.wav": ("happy", "YAF"),
        "TESS/YAF_Pleasant_surprise/YAF_back_ps.wav": None,
        "TESS/YAF_sad/YAF_back_sad.wav": ("sad", "YAF"),
    },
    "SAVEE": {
        "DC_a01.wav": ("angry", "DC"),
        "DC_d01.wav": None,
        "JE_sa02.wav": ("sad", "JE"),
        "JK_su03.wav": None,
        "KL_n30.wav": ("neutral", "KL"),
    },
    "SAVEE in folders": {
        "AudioData/DC/a01.wav": ("angry", "DC"),
        "AudioData/JE/f01.wav": None,
        "AudioData/KL/h15.wav": ("happy", "KL"),
    },
    "CREMA-D": {
        "AudioWAV/1001_DFA_ANG_XX.wav": ("angry", "1001"),
        "AudioWAV/1001_IEO_FEA_HI.wav": None,
        "AudioWAV/1040_ITH_SAD_X.wav": ("sad", "1040"),
    },
    "ESD": {
        "0001/Angry/0001_000351.wav": ("angry", "0001"),
        "0001/Surprise/0001_001401.wav": None,
        "0020/Happy/train/0020_000701.wav": ("happy", "0020"),
        "0020/Neutral/evaluation/0020_000001.wav": ("neutral", "0020"),
    },
}


@pytest.mark.parametrize("name", TREES)
def test_a_corpus_is_known_by_its_file_names_with_its_labels_and_speakers(name, tmp_path, caplog):
    tree = TREES[name]
    root = touched(tmp_path / "mine", *tree)
    with caplog.at_level("INFO"):
        listed = {u.wav.relative_to(root).as_posix(): (u.emo, u.speaker) for u in list_folder(root)}
    assert listed == {path: right for path, right in tree.items() if right}
    assert f"labels from {name.split()[0]} file names" in caplog.text
    assert f"left out: {sum(right is None for right in tree.values())} of other emotions" in caplog.text


def test_a_doubled_tess_tree_gives_each_utterance_once(tmp_path, caplog):
    root = tmp_path / "TESS Toronto emotional speech set data"
    write_tess(root, takes=1)
    write_tess(root / root.name, takes=1)
    with caplog.at_level("INFO"):
        assert Counter(u.emo for u in list_folder(tmp_path)) == dict.fromkeys(LABELS, 2)
    assert "each utterance once: 14 are there a second time" in caplog.text


def test_a_few_other_files_in_a_known_corpus_are_left_out_and_many_make_it_unknown(tmp_path, caplog):
    names = [f"DC_{code}{number:02d}.wav" for code in ("a", "h", "n", "sa") for number in range(1, 11)]
    root = touched(tmp_path, *names, "intro.wav")
    assert len(list_folder(root)) == 40 and "1 recordings have no label" in caplog.text
    touched(tmp_path, *(f"{number}.wav" for number in range(20)))
    assert {emo for emo, _ in labels_and_speakers(root)} == {None}


# Tables of real people.

ROWS = [("a b.wav", "Anger", "anna"), ("sub/ż.wav", "sadness", "bert"), ("c.wav", "fear", "bert")]


def tabled(root, name, data):
    touched(root, *(unicodedata.normalize("NFD", path) for path, *_ in ROWS))
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    return root


def joined(separator=",", header=("file", "emo", "speaker"), end="\n", rows=ROWS):
    return end.join(separator.join(row) for row in (header, *rows)) + end


FORMS = {
    "plain": joined().encode(),
    "semicolons with a mark of the byte order": joined(";", end="\r\n").encode("utf-8-sig"),
    "tabs in UTF-16": joined("\t", end="\r\n").encode("utf-16"),
    "a line for Excel": ("sep=;\r\n" + joined(";", end="\r\n")).encode(),
    "quotes": "\n".join(",".join(f'"{cell}"' for cell in row) for row in (("file", "emo", "speaker"), *ROWS)).encode(),
    "spaces": joined(" , ").encode(),
    "line ends of old Macintoshes": joined(";", end="\r").encode(),
    "other names of the columns": joined(header=("Filename", "Label", "Speaker ID")).encode(),
    "empty rows": (joined(";") + ";;\n\n").encode(),
    "backslashes": joined(rows=[(path.replace("/", "\\"), *rest) for path, *rest in ROWS]).encode(),
    "decomposed names": unicodedata.normalize("NFD", joined()).encode(),
    "a row twice": (joined() + ",".join(ROWS[0]) + "\n").encode(),
    "more columns": "\n".join(",".join(["1", *row, "note"]) for row in (("file", "emo", "speaker"), *ROWS)).encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["labels.csv", "Labels.CSV", "labels.tsv"])
def test_a_table_is_read_as_spreadsheets_and_people_write_it(form, name, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert labels_and_speakers(tabled(tmp_path, name, FORMS[form])) == {("angry", "anna"), ("sad", "bert")}
    assert f"labels from {name}: angry 1, sad 1" in caplog.text
    assert "left out: 1 of other emotions (fearful 1)" in caplog.text


def test_a_table_in_one_folder_below_gives_paths_from_there_on(tmp_path):
    tabled(tmp_path / "rec", "labels.csv", joined().encode())
    assert labels_and_speakers(tmp_path) == {("angry", "anna"), ("sad", "bert")}


def test_two_tables_are_an_error_that_names_both(tmp_path):
    for folder in ("monday", "tuesday"):
        tabled(tmp_path / folder, "labels.csv", joined().encode())
    with pytest.raises(CorpusError, match=r"holds 2 tables of labels \(monday/labels.csv, tuesday/labels.csv\)"):
        list_folder(tmp_path)


def test_a_few_rows_of_an_unknown_class_are_left_out_by_line_and_name(tmp_path, caplog):
    rows = [*ROWS, ("a.wav", "purple", "anna")]
    touched(tmp_path, "a.wav")
    assert len(list_folder(tabled(tmp_path, "labels.csv", joined(rows=rows).encode()))) == 2
    assert "labels.csv, line 5: unknown class 'purple'; 1 rows of it take no part. Known classes: angry" in caplog.text


def test_a_file_that_is_missing_is_counted_and_its_path_is_suggested_where_most_are(tmp_path):
    for number, path in enumerate(("x/1.wav", "x/2.wav", "x/3.wav")):
        write_wav(tmp_path / "mine" / path, utterance("sad", number, 1))
    table = tmp_path / "mine" / "labels.csv"
    table.write_text("file,emo,speaker\nx/1.wav,sad,a\nx/2.wav,sad,b\nx/9.wav,sad,c\n")
    prepare_folder(tmp_path / "mine", tmp_path / "m", {"adapt": 0.5, "test": 0.5})
    assert "x/9.wav" in (tmp_path / "m" / "skipped.json").read_text()
    table.write_text("file,emo\n1.wav,sad\n2.wav,sad\n3.wav,sad\n")
    with pytest.raises(CorpusError, match=r"3 of the 3 files that it names are not there .*There is x/1.wav"):
        list_folder(tmp_path / "mine")


# Splits.


def skewed():
    """Speakers whose alphabetical order would give nearly all angry recordings to the first split."""
    return {
        f"s{n:02d}": {"angry": 40 if n < 6 else 2, "happy": 5 + n, "sad": 30 if n % 3 == 0 else 1} for n in range(15)
    }


def shares_of(counts, groups):
    total, held = Counter(), Counter()
    for name, classes in counts.items():
        total.update(classes)
        held.update(classes if name in groups else {})
    return {label: held[label] / total[label] for label in total}


def test_a_split_by_speaker_gives_each_split_its_share_of_every_class(caplog):
    counts = skewed()
    assert shares_of(counts, sorted(counts)[:9])["angry"] > 0.9
    dealt = balanced_groups(counts, SHARES)
    assert sorted(dealt["adapt"] + dealt["test"]) == sorted(counts) and 7 <= len(dealt["adapt"]) <= 11
    assert all(share == pytest.approx(0.6, abs=0.06) for share in shares_of(counts, dealt["adapt"]).values())
    assert not caplog.text


def test_a_balanced_split_depends_on_no_order():
    counts = skewed()
    assert balanced_groups(dict(reversed(counts.items())), SHARES) == balanced_groups(counts, SHARES)


def test_a_class_that_one_speaker_holds_alone_is_said(caplog):
    counts = {"a": {"sad": 9, "angry": 3}, "b": {"angry": 3}, "c": {"angry": 3}, "d": {"angry": 3}}
    dealt = balanced_groups(counts, SHARES)
    assert all(dealt.values())
    assert "0 of 9 recordings of 'sad'" in caplog.text and "1 speaker have this class (a)" in caplog.text


def test_every_split_gets_a_speaker_however_uneven_they_are():
    counts = {"a": {"sad": 1000}, "b": {"sad": 1}, "c": {"sad": 1}}
    assert all(balanced_groups(counts, {"train": 0.98, "valid": 0.01, "test": 0.01}).values())


def test_only_a_corpus_without_an_order_of_its_own_is_balanced(tmp_path):
    listed = [Utterance(f"t-{n}", tmp_path / f"{n}.wav", LABELS[n % 2], "abcd"[n % 4]) for n in range(8)]
    halves = {"train": 0.5, "test": 0.5}
    assert deal(listed, halves, "acbd")[1] == {"train": ["a", "c"], "test": ["b", "d"]}
    assert deal(listed, halves, "acbd", balanced=True)[1] == {"train": ["a", "d"], "test": ["b", "c"]}


# Where a corpus is looked for.


def test_the_folder_of_the_environment_is_not_searched_where_one_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MIFUSE_CORPORA", str(write_ravdess(tmp_path / "corpora" / "ravdess", [1], 1).parent))
    (tmp_path / "mine" / "other").mkdir(parents=True)
    with pytest.raises(
        CorpusError, match=rf"'ravdess' not found .*'Actor_\*'.*{tmp_path / 'mine' / 'other'}.*data_fol"
    ):
        find_corpus("ravdess", "Actor_*", tmp_path / "mine" / "other")
    assert find_corpus("ravdess", "Actor_*") == tmp_path / "corpora" / "ravdess"


def test_a_corpus_folder_is_found_in_any_case_and_one_beside_is_said(tmp_path, caplog):
    write_ravdess(tmp_path / "RAVDESS", [1], 1)
    assert find_corpus("ravdess", "Actor_*", tmp_path).name == "RAVDESS" and not caplog.text
    (tmp_path / "nemo").mkdir()
    assert find_corpus("ravdess", "Actor_*", tmp_path / "nemo").name == "RAVDESS"
    assert "the folder beside it is taken" in caplog.text


# Real speech.


@pytest.mark.parametrize("with_speakers", [True, pytest.param(False, marks=pytest.mark.long)])
def test_real_nemo_as_a_tree_of_class_folders_is_split_with_every_class_in_its_share(
    with_speakers, real_corpora, tmp_path
):
    with (real_corpora / "nemo" / "data.tsv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            wav = next((real_corpora / "nemo" / "samples").glob(f"{row['file_id'].removesuffix('.wav')}.*"))
            folder = tmp_path / "mine" / (row["speaker_id"].strip() if with_speakers else "") / row["emotion"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / wav.name).symlink_to(wav)
    prepare_folder(tmp_path / "mine", tmp_path / "m", SHARES)
    adapt, test = (read_manifest(tmp_path / "m" / f"{split}.json").values() for split in SHARES)
    assert len(adapt) + len(test) == 1799
    for emo, count in Counter(row["emo"] for row in test).items():
        assert count / 450 == pytest.approx(0.4, abs=0.05), emo
    assert not {row["speaker"] for row in adapt} & {row["speaker"] for row in test}
