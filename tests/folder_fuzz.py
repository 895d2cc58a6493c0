"""Fuzzes the folder of a recognizer: each copy is damaged or holds an attack, and is then loaded and used.

Each case must load and give finite answers, or be one RecogniserError. No code in the folder may run.

    python tests/folder_fuzz.py --cases 10000
"""

import argparse
import json
import random
import resource
import tempfile
from collections import Counter
from pathlib import Path

import torch
import toy_corpora
from safetensors.torch import load, save

from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.inference import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import RecogniserError, export_recogniser
from speechbrain_mifuse.nnet.classifier import EmotionClassifier

LABELS = ("angry", "happy", "neutral", "sad")
# MARK is a folder that exists once the code has run.
ATTACKS = [
    "!apply:os.mkdir [MARK]",
    "!new:os.mkdir [MARK]",
    "!name:os.mkdir",
    "!module:os",
    "!include:MARK",
    "!copy <encoder>",
    "!!python/object/apply:os.mkdir [MARK]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [MARK]",
    '(!!python/object/apply:os.mkdir ["MARK"])',
    "'(!!python/object/apply:os.mkdir [\"MARK\"])'",
    "\"(!!python/object/apply:os.mkdir ['MARK'], 1)\"",
    '["(!!python/object/apply:os.mkdir [MARK])"]',
    '!tuple (!!python/object/apply:os.mkdir ["MARK"])',
    "!ref '(!!python/object/apply:os.mkdir [MARK])'",
    "!ref <classifier.__class__>",
    "!ref <sample_rate> ** <sample_rate> ** <sample_rate> ** <sample_rate>",
    "&x [*x]",
    "!!map [1]",
    "!!bool x",
]
DEEP = "@@DEEP@@"
NASTY = [None, True, False, 0, -1, 1, 2, 7, 10**12, 10**39, 10**60, 1e-300, 0.5, 1e300, float("nan"), float("inf")]
NASTY += ["", " ", "x" * 300, "\x00", "\ud800", "../..", "/dev/zero", "demo", [], {}, [[]], ["a"] * 4, {"a": {}}, DEEP]
BYTES = (b"\x00", b"\xff", b"\n", b" ", b"(", b")", b"!", b"&", b"*", b"[", b"{", b"9" * 5000, b"[" * 5000)


def write_recognizer(folder, dim=16):
    """Export a recognizer with its encoder inside."""
    torch.manual_seed(0)
    encoder = FrozenEncoder(str(toy_corpora.write_encoder(folder / "encoder", dim)), [1])

    class Frames:
        n_layers, layer, frame_average, dim = 1, 1, 1, encoder.dim
        store = type("Store", (), {"layers": [1]})

    about = {"labels": LABELS, "features": {"dim": encoder.dim}, "corpus": "toy"}
    hparams = {"labels": LABELS, "encoder": str(folder / "encoder"), "trim_db": 40.0}
    export_recogniser(folder, EmotionClassifier(encoder.dim, len(LABELS), 8, attention_size=4), Frames, hparams, about)
    return folder


def places(value, path=()):
    """Yield the path of every part of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed_json(content, rng, mark):
    """Drop, replace or add one value of a JSON file."""
    value = json.loads(content)
    path = rng.choice([path for path in places(value) if path] or [()])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = rng.randrange(4)
    if how == 0:
        del parent[path[-1]]
    elif how == 1:
        parent[path[-1]] = rng.choice(ATTACKS).replace("MARK", str(mark))
    elif how == 2 and isinstance(parent, dict):
        parent[rng.choice(["auto_map", "quantization_config", "attn_implementation", "x"])] = rng.choice(NASTY)
    else:
        parent[path[-1]] = rng.choice(NASTY)
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 50000 + "]" * 50000).encode()


def changed_yaml(content, rng, mark):
    """Put an attack or a nasty value into a random place of a YAML file."""
    lines = content.decode().splitlines()
    number = rng.randrange(1, len(lines))
    attack = rng.choice(ATTACKS).replace("MARK", str(mark))
    nasty = json.dumps(rng.choice(NASTY)).replace(f'"{DEEP}"', "[" * 5000)
    key, colon, value = lines[number].partition(": ")
    how = rng.randrange(7)
    if how == 0:
        del lines[number]
    elif how == 1:
        lines[number] = f"{key}: {attack}"
    elif how == 2:
        lines[number] = f"{key}: {nasty}"
    elif how == 3:
        lines.append(rng.choice([f"note: {attack}", f"? {attack}\n: 1", f"- {attack}", f"note: [1, {{a: {attack}}}]"]))
    elif how == 4:
        lines.insert(number, lines[rng.randrange(len(lines))])
    elif how == 5:
        lines[number] = f"{key}: {value} {attack}"
    else:
        lines[number] = lines[number].replace(value, f"[{value}, {attack}]") if colon else attack
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def changed_weights(content, rng):
    """Change values, a shape or a name in a safetensors file."""
    weights = load(content)
    name = rng.choice(sorted(weights))
    how = rng.randrange(4)
    if how == 0:
        del weights[name]
    elif how == 1:
        weights[name] = weights[name][..., None].clone()
    elif how == 2:
        weights["x" * 100] = weights[name].clone()
    else:
        value = rng.choice([float("nan"), float("inf"), 1e38, -1e30, 1e6, -1.0, 0.0])
        weights[name] = torch.full_like(weights[name], value if weights[name].is_floating_point() else 1)
    return save(weights)


def changed_bytes(content, rng):
    """Flip, cut or insert bytes."""
    place = rng.randrange(len(content))
    how = rng.randrange(3)
    if how == 0:
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    return content[:place] if how == 1 else content[:place] + rng.choice(BYTES) + content[place:]


def changed(path, content, rng, mark):
    """Change a file in one of the ways that fit its kind."""
    if rng.random() < 0.25:
        return changed_bytes(content, rng)
    if path.suffix == ".json":
        return changed_json(content, rng, mark)
    return changed_yaml(content, rng, mark) if path.suffix == ".yaml" else changed_weights(content, rng)


def outcome(folder, clip):
    """Load and use a recognizer: `used`, or `refused` where that is one RecogniserError."""
    try:
        recognizer = EmotionRecognizer.from_hparams(folder)
        answers = [recognizer.predict_proba(clip), recognizer.classify_batch(clip)[0]]
    except RecogniserError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, error
        return "refused"
    assert all(bool(probs.isfinite().all()) for probs in answers)
    return "used"


def fuzz(cases, seed=0):
    """Try many damaged folders; count the outcomes."""
    rng, clip = random.Random(seed), torch.randn(8000, generator=torch.Generator().manual_seed(0)) / 10
    with tempfile.TemporaryDirectory() as temporary:
        folder, mark = write_recognizer(Path(temporary) / "recognizer"), Path(temporary) / "mark"
        files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES}
        assert outcome(folder, clip) == "used"
        before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter()
        for case in range(cases):
            path = rng.choice(sorted(files))
            path.write_bytes(changed(path, files[path], rng, mark))
            try:
                found[outcome(folder, clip)] += 1
            except Exception as error:
                (Path(tempfile.gettempdir()) / f"folder_fuzz_{path.name}").write_bytes(path.read_bytes())
                raise AssertionError(f"seed {seed}, case {case}: {path.name}: {error!r}") from error
            assert not mark.exists(), f"seed {seed}, case {case}: code in {path.name} ran"
            path.write_bytes(files[path])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MB, f"{grown:.0f} MB more than before"
    return found


SUFFIXES = (".json", ".yaml", ".safetensors")
# Memory that all cases together may add.
MOST_MB = 1000

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(dict(fuzz(options.cases, options.seed)))
