"""Bad manifests: what is read is right, and everything else is one clear error that names the file and the entry."""

import copy
import json
import math
import os
import random
import time

import pytest

from speechbrain_mifuse.corpora.corpus import is_prepared
from speechbrain_mifuse.corpora.manifest import ROOT, CorpusError, read_manifest
from speechbrain_mifuse.features.dataset import encoded_rows, label_index
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

LABELS = ("angry", "happy", "neutral", "sad")
ABOUT = {"data_root": "/toy", "splits": {"train": 0.5, "test": 0.5}}
ROWS = {
    f"t-{n}": {"wav": f"{ROOT}/{n}.wav", "length": 0.5 + n, "emo": LABELS[n % 4], "speaker": str(n % 3)}
    for n in range(6)
}
# Values that JSON can hold, and that stand where they should not.
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e400,
    10**30,
    math.nan,
    math.inf,
    "",
    "x",
    "sad",
    "\ud800",
    "a\0b",
    [],
    {},
    [1],
)
VALUES += (
    "{data_root}/../../etc/passwd",
    "/etc/passwd",
    "../a.wav",
    "żółw.wav",
    "{data_root}",
    {"wav": "a"},
    "9" * 5000,
)


@pytest.fixture
def path(tmp_path):
    atomic_write(tmp_path / "corpus.json", json.dumps(ABOUT))
    return tmp_path / "train.json"


def outcome(path, content):
    """Rows of a manifest of this content, or its one error."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    try:
        rows = encoded_rows(path, None)
    except UserError as error:
        told = str(error)
        assert isinstance(error, CorpusError) and told.startswith(f"{path}: ") and told.endswith(".")
        assert told.isprintable() and len(told) < 2000 and told.encode()
        return error
    for key, row in rows.items():
        usable(key, row)
    return rows


def usable(key, row):
    """Check an entry against what the pipeline does with it."""
    assert key.encode() is not None and row["wav"].encode() and "\0" not in row["wav"]
    assert ".." not in row["wav"].split("/")
    assert 0 <= float(row.get("length", 0)) < math.inf and isinstance(row.get("speaker", ""), str)
    assert isinstance(row.get("speaker_known", True), bool)
    try:
        assert LABELS[label_index(LABELS, row, key)] == row["emo"]
    except CorpusError as error:
        assert repr(key) in repr(str(error)) or key in str(error)
        assert row.get("emo") not in LABELS


def expected():
    return {key: {**row, "wav": row["wav"].replace(ROOT, "/toy")} for key, row in ROWS.items()}


def test_the_manifest_that_is_damaged_below_is_right(path):
    assert outcome(path, ROWS) == expected()


NAMED = {
    "no object": ({"t-0": 5}, "'t-0': not an object"),
    "no wav": ({"t-0": {"emo": "sad"}}, "'t-0': no wav"),
    "an empty wav": ({"t-0": {"wav": ""}}, "'t-0': wav is no text"),
    "a wav of another type": ({"t-0": {"wav": ["a.wav"]}}, "'t-0': wav is no text"),
    "a wav with a zero byte": ({"t-0": {"wav": "a\0.wav"}}, "'t-0': wav holds a zero byte"),
    "a wav that no file can hold": ({"t-0": {"wav": "a\ud800.wav"}}, "'t-0': wav holds characters"),
    "a wav outside the root": ({"t-0": {"wav": "{data_root}/../../etc/a.wav"}}, "'t-0': wav leaves the data root"),
    "a length that is no number": ({"t-0": {"wav": "a", "length": "1"}}, "'t-0': length is no number of seconds"),
    "a negative length": ({"t-0": {"wav": "a", "length": -1}}, "'t-0': length is no number of seconds"),
    "a length without end": ({"t-0": {"wav": "a", "length": 10**40}}, "a number of 41 digits"),
    "a length that is a truth value": ({"t-0": {"wav": "a", "length": True}}, "'t-0': length is no number of seconds"),
    "an emotion of another type": ({"t-0": {"wav": "a", "emo": ["sad"]}}, "'t-0': emo is no text"),
    "a speaker of another type": ({"t-0": {"wav": "a", "speaker": 3}}, "'t-0': speaker is no text"),
    "a speaker that may be known": ({"t-0": {"wav": "a", "speaker_known": "no"}}, "'t-0': speaker_known is neither"),
    "an id that no file can hold": ({"t-\ud800": {"wav": "a"}}, "its id holds characters"),
    "NaN": (b'{"t-0": {"wav": "a", "length": NaN}}', "NaN is no number"),
    "infinity": (b'{"t-0": {"wav": "a", "length": -Infinity}}', "-Infinity is no number"),
    "a doubled id": (b'{"t-0": {"wav": "a", "emo": "sad"}, "t-0": {"wav": "a", "emo": "angry"}}', "'t-0' stands twice"),
    "a doubled label": (b'{"t-0": {"wav": "a", "emo": "sad", "emo": "angry"}}', "'emo' stands twice"),
    "a list": ([1], "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "nothing": (b"", "Expecting value"),
    "half": (json.dumps(ROWS).encode()[:100], "line 1 column"),
    "no text": (b"\xff\xfe\xfa", "decode"),
    "no end of brackets": (b"[" * 100_000, "nested too deeply"),
    "a number of many digits": (b'{"t-0": {"wav": "a", "length": ' + b"9" * 5000 + b"}}", "digits"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_wrong_with_a_manifest_is_named(path, name):
    content, says = NAMED[name]
    error = outcome(path, content)
    assert isinstance(error, CorpusError) and f"{path}: not a manifest" in str(error) and says in str(error)


@pytest.mark.parametrize("emo", ["furious", "Sad", " sad", "neutral\n"])
def test_an_unknown_emotion_is_an_error_that_names_the_entry_where_labels_are_read(path, emo):
    rows = outcome(path, {"t-0": {"wav": "a", "emo": emo}})
    with pytest.raises(CorpusError, match=r"(?s)'t-0' has the label .* none of angry, happy, neutral, sad"):
        label_index(LABELS, rows["t-0"], "t-0")


def test_a_manifest_of_nothing_is_an_error_where_it_is_read(path):
    assert "none of its utterances" in str(outcome(path, {}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object"),
        (b"{}", "data_root is no path"),
        (b'{"data_root": 5}', "data_root is no path"),
        (b'{"data_root": "a\\u0000"}', "data_root is no path"),
        (b'{"data_root": "/toy", "splits": [1]}', "splits is no mapping"),
        (b'{"data_root": "/toy", "data_root": "/else"}', "'data_root' stands twice"),
        (b"\xff", "decode"),
    ],
)
def test_the_file_beside_the_manifests_is_the_one_that_is_blamed(path, content, says):
    atomic_write(path, json.dumps(ROWS))
    path.with_name("corpus.json").write_bytes(content)
    with pytest.raises(CorpusError, match=r"corpus.json: not what a preparation leaves") as error:
        read_manifest(path)
    assert says in str(error.value)


def test_a_folder_in_the_place_of_a_manifest_is_an_error_naming_it(path):
    path.mkdir()
    with pytest.raises(CorpusError, match=r"train.json: not a manifest \(not a regular file\)"):
        read_manifest(path)


def test_a_file_named_like_the_root_is_found(path):
    assert outcome(path, {"t-0": {"wav": f"{ROOT}/{ROOT}.wav"}})["t-0"]["wav"] == f"/toy/{ROOT}.wav"


def test_a_byte_order_mark_and_unknown_fields_change_nothing(path):
    rows = {key: {**row, "note": {"any": [1]}} for key, row in ROWS.items()}
    found = outcome(path, b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert {key: {k: v for k, v in row.items() if k != "note"} for key, row in found.items()} == expected()


def test_a_large_manifest_is_read_in_seconds(path):
    rows = {f"t-{n}": {"wav": f"{ROOT}/{n}.wav", "emo": "sad", "speaker": "1", "length": 1.0} for n in range(20_000)}
    atomic_write(path, json.dumps(rows))
    began = time.process_time()
    assert len(read_manifest(path)) == 20_000
    assert time.process_time() - began < 10


def fields_changed(rng):
    """Other values, missing and additional fields, other ids."""
    rows = copy.deepcopy(ROWS)
    touched = set()
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(sorted(rows))
        touched.add(key)
        kind = rng.randrange(5)
        if kind == 0 or not isinstance(rows[key], dict):
            rows[key] = rng.choice(VALUES)
        elif kind == 1:
            rows[key].pop(rng.choice(sorted(rows[key])), None)
            rows[key] = rows[key] or 0
        elif kind == 2:
            rows[rng.choice(("", "t-\ud800", "x" * 3000, "t-0/../..", "<b>"))] = rows.pop(key)
            break
        else:
            rows[key][rng.choice(("wav", "emo", "length", "speaker", "session", "speaker_known", "x"))] = rng.choice(
                VALUES
            )
    return rows, touched


def bytes_changed(rng):
    """Cut, doubled, lost and other bytes."""
    data = bytearray(json.dumps(ROWS).encode())
    for _ in range(rng.randrange(1, 4)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:b]
        elif kind == 1:
            data[a:b] = b""
        elif kind == 2:
            data[a:a] = data[a:b]
        elif kind == 3:
            data[a : a + 1] = bytes([rng.randrange(256)])
        else:
            data[a:a] = rng.choice((b"{", b"}", b'"', b",", b"NaN", b"\0", b"null", b"\\ud800", b"[" * 2000))
        data = data or bytearray(b" ")
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_a_manifest_with_other_fields_is_read_as_it_says_or_refused_naming_the_entry(path, seed):
    refused = 0
    for number in range(150):
        rows, touched = fields_changed(random.Random(f"{seed}:{number}"))
        found = outcome(path, rows)
        if isinstance(found, CorpusError):
            refused += 1
            assert "is no number" in str(found) or any(f"'{ascii(key)[1:-1]}'" in str(found) for key in rows)
        else:
            assert all(found[key] == row for key, row in expected().items() if key not in touched and key in rows)
    assert 30 < refused < 150


@pytest.mark.parametrize("seed", range(4))
def test_a_manifest_with_other_bytes_is_read_as_it_says_or_refused(path, seed):
    for number in range(150):
        data = bytes_changed(random.Random(f"{seed}:{number}"))
        found = outcome(path, data)
        if not isinstance(found, CorpusError):
            told = json.loads(data)
            assert [*found] == [*told] and all(found[key].get("emo") == told[key].get("emo") for key in told)


def test_a_corpus_json_that_is_none_counts_as_not_prepared(tmp_path):
    for content in ("[" * 100_000, "[]", "{"):
        (tmp_path / "corpus.json").write_text(content)
        assert not is_prepared(tmp_path, {"corpus": "toy"})
    (tmp_path / "corpus.json").unlink()
    os.mkfifo(tmp_path / "corpus.json")
    assert not is_prepared(tmp_path, {"corpus": "toy"})
