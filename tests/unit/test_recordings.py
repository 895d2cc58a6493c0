"""Listing of a folder: every recording once, whatever its ending, case and way there; the rest is counted."""

import logging
import os

import pytest
import soundfile

from speechbrain_mifuse.corpora.recordings import recordings_below
from speechbrain_mifuse.utils.audio import load_audio
from speechbrain_mifuse.utils.audio_files import ENDINGS, FOREIGN

# Endings that libsndfile's formats usually have.
USUAL = {
    "AIFF": (".aif", ".aiff", ".aifc"),
    "AU": (".au", ".snd"),
    "AVR": (".avr",),
    "CAF": (".caf",),
    "FLAC": (".flac",),
    "HTK": (".htk",),
    "IRCAM": (".sf", ".ircam"),
    "MP3": (".mp3", ".mp2"),
    "NIST": (".sph", ".nist"),
    "OGG": (".ogg", ".oga"),
    "PAF": (".paf", ".fap"),
    "PVF": (".pvf",),
    "RF64": (".rf64",),
    "SDS": (".sds",),
    "SVX": (".svx", ".8svx"),
    "VOC": (".voc",),
    "W64": (".w64",),
    "WAV": (".wav", ".wave", ".bwf"),
    "WAVEX": (".wav",),
    "WVE": (".wve",),
}


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root):
    return [path.relative_to(root).as_posix() for path in recordings_below(root)]


@pytest.fixture(autouse=True)
def no_ffmpeg(monkeypatch):
    """Hides one that may be installed."""
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(("form", "ending"), [(form, ending) for form, endings in USUAL.items() for ending in endings])
def test_a_recording_of_every_format_is_listed_and_read_in_any_case_of_its_ending(tmp_path, form, ending):
    path = tmp_path / f"a{ending.upper()}"
    soundfile.write(path, [0.1, -0.2, 0.3, -0.1] * 500, 8000, format=form)
    assert recordings_below(tmp_path) == [path]
    assert load_audio(path).any()


def test_what_only_ffmpeg_reads_is_listed_where_it_is_installed_and_else_warned_of(tmp_path, monkeypatch, caplog):
    touch(tmp_path / "mine", "a.wav", "b.M4A", "c.webm")
    assert names(tmp_path / "mine") == ["a.wav"]
    assert "2 recordings are left out (first: b.M4A)" in caplog.text and "Install ffmpeg" in caplog.text
    (tmp_path / "ffmpeg").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert names(tmp_path / "mine") == ["a.wav", "b.M4A", "c.webm"]


def test_what_is_passed_over_is_counted_in_one_line(tmp_path, caplog):
    touch(tmp_path, "a.wav", "1.txt", "x/2.TXT", "x/3.txt", "Thumbs.db", "README", ".DS_Store", "._a.wav", ".x/b.wav")
    assert names(tmp_path) == ["a.wav"]
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "5 other files were passed over: .txt 3" in line.getMessage() and ".db 1" in line.getMessage()


def test_nothing_is_said_of_a_table_of_labels_and_of_hidden_files(tmp_path, caplog):
    touch(tmp_path, "a.wav", "labels.csv", ".DS_Store")
    assert names(tmp_path) == ["a.wav"] and not caplog.records


def test_linked_files_and_folders_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/a.wav", "elsewhere/deep/b.flac", "other/c.wav", "mine/d.wav")
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "c.wav").symlink_to("../other/c.wav")
    assert names(tmp_path / "mine") == ["c.wav", "d.wav", "linked/a.wav", "linked/deep/b.flac"]


def test_links_in_a_circle_end_and_no_recording_is_listed_twice(tmp_path, caplog):
    touch(tmp_path, "mine/a/1.wav", "mine/b/2.wav", "mine/3.wav", "above.wav")
    for link, target in (
        ("a/up", ".."),
        ("a/beside", "../b"),
        ("b/beside", "../a"),
        ("b/self", "."),
        ("above", "../.."),
        ("again.wav", "a/1.wav"),
    ):
        (tmp_path / "mine" / link).symlink_to(target)
    assert names(tmp_path / "mine") == ["3.wav", "a/1.wav", "b/2.wav"]
    assert "links to listed recordings 1" in caplog.text


def test_a_folder_that_is_itself_a_link_is_listed(tmp_path):
    touch(tmp_path, "mine/a.wav")
    (tmp_path / "link").symlink_to("mine")
    assert names(tmp_path / "link") == ["a.wav"]


def test_a_link_to_nothing_is_listed_so_that_reading_it_says_so(tmp_path):
    (tmp_path / "a.wav").symlink_to("nothing.wav")
    (tmp_path / "b.wav").symlink_to("b.wav")
    assert names(tmp_path) == ["a.wav", "b.wav"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may open every folder")
def test_a_folder_that_cannot_be_opened_is_named(tmp_path, caplog):
    touch(tmp_path, "a.wav", "closed/b.wav")
    (tmp_path / "closed").chmod(0)
    assert names(tmp_path) == ["a.wav"] and "closed: cannot be opened" in caplog.text
    (tmp_path / "closed").chmod(0o755)


def test_an_ending_has_one_decoder():
    assert not set(ENDINGS) & set(FOREIGN)
    assert all(ending == ending.lower() and ending.startswith(".") for ending in ENDINGS + FOREIGN)
