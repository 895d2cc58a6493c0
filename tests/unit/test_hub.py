"""Models in a hub repository: a stand-in for the hub on this machine, and a fresh process that asks it."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from toy_corpora import LABELS, utterance, write_wav

from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

CODE = """import json, sys
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.inference import EmotionRecognizer
recogniser = EmotionRecognizer.from_hparams("someone/emotions")
print(json.dumps(recogniser.predict_file(sys.argv[1])[1].flatten().tolist()))
try:
    EmotionRecognizer.from_hparams("someone/code")
except UserError as error:
    sys.exit(f"refused: {error}")
"""

ENCODERS = """import json, sys
from speechbrain_mifuse.features.encoder import FrozenEncoder
print(json.dumps(FrozenEncoder("someone/encoder").fingerprint()))
try:
    FrozenEncoder("someone/adapted")
except ValueError as error:
    print(f"refused: {error}")
"""


class Front:
    """What `export_recogniser` asks of a front."""

    n_layers, layer, frame_average = 1, 1, 4

    def __init__(self, encoder):
        self.dim = encoder.dim
        self.store = type("Store", (), {"layers": [1]})


@pytest.fixture
def repository(tmp_path, toy_encoder):
    """A recogniser, exported."""
    torch.manual_seed(0)
    front = Front(FrozenEncoder(str(toy_encoder), [1]))
    hparams = {"labels": LABELS, "encoder": str(toy_encoder), "trim_db": 40.0}
    about = {"labels": LABELS, "features": {}}
    export_recogniser(tmp_path / "repository", EmotionClassifier(front.dim, len(LABELS)), front, hparams, about)
    return tmp_path / "repository"


def with_code(repository):
    """Copy a recogniser into a repository whose YAML file makes a folder when it is loaded."""
    folder = shutil.copytree(repository, repository.with_name("code"))
    with (folder / "hyperparams.yaml").open("a") as file:
        file.write(f"extra: !apply:os.mkdir [{repository.with_name('mark')}]\n")
    return folder


def adapted(folder, encoder):
    """Copy an encoder into a repository with an adapter of PEFT."""
    shutil.copytree(encoder, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/code"}')
    return folder


@pytest.fixture
def hub(repository, toy_encoder, tmp_path):
    """Serves repositories of `someone` as the hub does; gives its address and what was asked for."""
    folders, asked = {"emotions": repository, "code": with_code(repository), "encoder": toy_encoder}, []
    folders["adapted"] = adapted(tmp_path / "adapted", toy_encoder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            if self.path.startswith("/api/models/someone/"):
                return self.describe(*self.path.removeprefix("/api/models/someone/").split("/")[:2])
            name, _, file = self.path.removeprefix("/someone/").partition("/resolve/")
            file = file.partition("/")[2]
            if name not in folders:
                return self.send_error(404)
            path = folders[name] / file
            asked.append(f"{name}/{file}")
            data = path.read_bytes() if path.is_file() else b""
            self.send_response(200 if path.is_file() else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            if not path.is_file():
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def describe(self, name, what="revision"):
            files = [path for path in folders[name].iterdir() if path.is_file()]
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in files]
            about = {"id": f"someone/{name}", "sha": "0" * 40, "siblings": [{"rfilename": path.name} for path in files]}
            data = json.dumps(tree if what == "tree" else about).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def ask(address, home, code, *arguments, **settings):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**kept, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **settings}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=home)


def test_a_recogniser_of_a_hub_repository_is_loaded_and_one_with_code_is_refused(hub, repository, tmp_path):
    address, asked = hub
    write_wav(tmp_path / "a.wav", utterance("sad", 1, 0))
    home = tmp_path / "home"
    home.mkdir()
    done = ask(address, home, CODE, tmp_path / "a.wav")
    assert {"emotions/hyperparams.yaml", "emotions/classifier.safetensors"} <= set(asked), done.stderr[-3000:]
    wanted = EmotionRecognizer.from_hparams(repository).predict_file(tmp_path / "a.wav")[1].flatten().tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(wanted, abs=1e-5)
    assert done.returncode == 1 and "refused" in done.stderr and "trust_code" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "mark").exists()


@pytest.mark.long
def test_an_encoder_of_a_hub_repository_is_loaded_also_offline_and_one_with_an_adapter_is_refused(
    hub, toy_encoder, tmp_path
):
    address, asked = hub
    home = tmp_path / "home"
    home.mkdir()
    wanted = FrozenEncoder(str(toy_encoder)).fingerprint()
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        asked.clear()
        done = ask(address, home, ENCODERS, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
        found, refusal = done.stdout.splitlines()[-2:]
        assert json.loads(found) == wanted
        assert refusal.startswith("refused: ") and "adapter_config.json: adapters of PEFT" in refusal
        assert bool(asked) == (not settings)
        assert not any(file.startswith("code/") for file in asked)
