"""What tests of several folders share: small corpora, a tiny encoder, and stored frames that can be learned from."""

import gc
import hashlib
import logging
import os
import signal
import subprocess
from pathlib import Path

# Before torch is imported: the tests' tensors are small, and threads that wait for a busy core cost ten times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import toy_corpora

from speechbrain_mifuse.features.store import FeatureStore


def pytest_collection_finish():
    """Take what was imported out of the garbage collector's walks: SpeechBrain starts one for each Whisper encoder."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """RAVDESS, nEMO and EmoDB of five speakers each, as `--data_folder` wants them."""
    return toy_corpora.write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def toy_encoder(tmp_path_factory):
    """Folder of an untrained Whisper encoder."""
    return toy_corpora.write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def real_corpora():
    """Folder of the real corpora."""
    folder = os.environ.get("MIFUSE_CORPORA")
    if not folder:
        pytest.skip("real corpora: set MIFUSE_CORPORA to the folder that holds ravdess/, nemo/ and emodb_2s/")
    return Path(folder)


@pytest.fixture
def no_corpora(monkeypatch):
    """Without the variable that names the real corpora."""
    monkeypatch.delenv("MIFUSE_CORPORA", raising=False)


@pytest.fixture
def filled_store(tmp_path):
    """Make a store of frames whose first value shows the class: (rows by id, fingerprint changes) -> store."""

    def fill(classes, name="store", **changes):
        fingerprint = {"encoder": "toy", "layers": [1, 2], "dim": 6, "trim_db": 40.0, "frame_average": 1, **changes}
        store = FeatureStore(tmp_path / name, fingerprint)
        with store.writer() as add:
            for number, (key, label) in enumerate(classes.items()):
                rng = np.random.default_rng(number)
                frames = rng.normal(0, 0.3, (len(store.layers), 5 + number % 4, store.dim))
                frames[..., label] += 1.0
                add(key, frames, audio=hashlib.sha256(key.encode()).hexdigest(), file=(1, 1))
        return store

    return fill


@pytest.fixture
def read_only():
    """Give a function that makes a folder read-only, also for root where a mount is allowed."""
    mounted = []

    def protect(folder):
        if os.geteuid() != 0:
            folder.chmod(0o555)
            return
        for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder, folder]):
            try:
                done = subprocess.run([str(word) for word in command], capture_output=True, check=False).returncode == 0
            except OSError:
                done = False
            if not done:
                pytest.skip("as root, and no file system can be mounted read-only here")
            if folder not in mounted:
                mounted.append(folder)

    yield protect
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_works():
    """A shell starts what it runs in the background with the interrupt signal ignored; undo that for the tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def logging_as_before():
    """Take back what a file's tests did to the root logger: SpeechBrain's experiments add handlers of their own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
