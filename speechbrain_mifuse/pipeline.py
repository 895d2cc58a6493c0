"""The steps of an adaptation recipe that come before adaptation; each does what is missing and skips what is done."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from speechbrain.utils.distributed import run_on_main

from speechbrain_mifuse.adaptation.selection import chosen_snapshot, known_rule
from speechbrain_mifuse.brains.classifier import train_classifier
from speechbrain_mifuse.brains.snapshots import Snapshots
from speechbrain_mifuse.corpora.manifest import atomic_write, read_manifest, unlabelled
from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.evaluation.results import evaluate, score_snapshots, side_by_side, write_results
from speechbrain_mifuse.features import cache_folder
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.encoder import FrozenEncoder
from speechbrain_mifuse.features.extract import FrameReader, extract, open_store
from speechbrain_mifuse.features.front import FinetunedEncoder, StoredFrames
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.inference import EmotionRecognizer, recogniser_digest
from speechbrain_mifuse.lalm.client import LalmClient
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.serve import EmotionServer
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.progress import quiet

logger = logging.getLogger(__name__)

# Stands in the place of the address while no server runs; the identity of a served teacher is its endpoint.
LOOPBACK = "http://127.0.0.1/v1"

# What an encoder is called in results, where its flag does not say.
ENCODERS = {"demo": "Whisper tiny.en (trained for English speech recognition)"}

# Loggers that tell of each request, some with its whole audio.
EVERY_REQUEST = ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "speechbrain_mifuse.lalm.serve")


def chosen_methods(hparams: Mapping) -> list[str]:
    """Names of the methods that `method` asks for: one, or a list.

    Parameters
    ----------
    hparams : mapping
        `method` and `adaptation[methods]`.

    Returns
    -------
    list of str
        In the order asked for.

    Raises
    ------
    UserError
        If a name is unknown; the message lists the known ones.

    Example
    -------
    >>> chosen_methods({"method": "mi_fuse", "adaptation": {"methods": {"mi_fuse": None}}})
    ['mi_fuse']
    """
    method, known = hparams["method"], hparams["adaptation"]["methods"]
    names = [method] if isinstance(method, str) else list(method)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--method: {', '.join(map(str, unknown))} is none of {', '.join(known)}.")
    return names


def open_reader(hparams: Mapping, run_opts: Mapping | None = None) -> FrameReader:
    """Build the frozen encoder with its preprocessing, on the device of the run.

    Parameters
    ----------
    hparams : mapping
        `encoder`, `encoder_layers`, `trim_db`, `frame_average`.
    run_opts : mapping, optional
        SpeechBrain's run options; `device` is read.

    Returns
    -------
    FrameReader
        Makes frames of recordings.

    Raises
    ------
    UserError
        If the encoder cannot be loaded.

    Example
    -------
    >>> open_reader({"encoder": "./no-such-folder", "encoder_layers": None})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: --encoder: ...
    """
    try:
        encoder = FrozenEncoder(hparams["encoder"], hparams["encoder_layers"])
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder: {error}") from None
    encoder.to((run_opts or {}).get("device", "cpu"))
    return FrameReader(encoder, hparams["trim_db"], hparams["frame_average"])


def store_frames(hparams: Mapping, role: str, reader: FrameReader) -> FeatureStore:
    """Fill the feature store of the corpus that plays a role.

    Parameters
    ----------
    hparams : mapping
        `feature_folder`, `<role>` (the corpus's name) and `<role>_manifests`.
    role : str
        `target`, `source` or `teacher`.
    reader : FrameReader
        Makes the frames.

    Returns
    -------
    FeatureStore
        With every readable utterance of the role's manifests.

    Raises
    ------
    StoreError
        If the folder holds frames of another kind.

    Example
    -------
    >>> store_frames.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'store_frames'
    """
    manifests = sorted(Path(hparams[f"{role}_manifests"]).glob("*_unlabelled.json"))
    # The name tells settings apart, so that trying another encoder or layer does not run into the first one's store.
    digest = hashlib.sha256(json.dumps(reader.fingerprint(), sort_keys=True).encode()).hexdigest()[:8]
    base = Path(hparams["feature_folder"] or cache_folder() / "features")
    folder = base / f"{hparams[role]}-{digest}"
    run_on_main(extract, kwargs={"manifests": manifests, "reader": reader, "folder": folder})
    return open_store(folder, reader)


def chosen_front(hparams: Mapping, run_opts: Mapping | None = None) -> StoredFrames | FinetunedEncoder:
    """Build where a classifier's frames come from, by the name in `features`.

    Parameters
    ----------
    hparams : mapping
        `features` and `fronts`, and what the chosen one needs.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    StoredFrames or FinetunedEncoder
        The front.

    Raises
    ------
    UserError
        If the name is unknown.

    Example
    -------
    >>> chosen_front({"features": "live", "fronts": {"stored": None, "finetune": None}})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: --features: 'live' is none of stored, finetune.
    """
    if hparams["features"] not in hparams["fronts"]:
        raise UserError(f"--features: '{hparams['features']}' is none of {', '.join(hparams['fronts'])}.")
    return hparams["fronts"][hparams["features"]](hparams, run_opts)


def stored_front(hparams: Mapping, run_opts: Mapping | None = None) -> StoredFrames:
    """Fill the store of the source corpus and read frames from it.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    StoredFrames
        The front.

    Example
    -------
    >>> stored_front.__name__  # runs in `recipes/RAVDESS/classifier/train.py`
    'stored_front'
    """
    return StoredFrames(store_frames(hparams, "source", open_reader(hparams, run_opts)), hparams["layer"])


def finetuned_front(hparams: Mapping, run_opts: Mapping | None = None) -> FinetunedEncoder:
    """Load the encoder to be trained along.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    FinetunedEncoder
        The front.

    Raises
    ------
    UserError
        If the encoder cannot be loaded.

    Example
    -------
    >>> finetuned_front({"encoder": "./no-such-folder", "trim_db": None})
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.errors.UserError: --encoder: ...
    """
    try:
        return FinetunedEncoder(hparams["encoder"], hparams["trim_db"])
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder: {error}") from None


def source_recogniser(hparams: Mapping, reader: FrameReader, run_opts: Mapping | None = None) -> Path:
    """Find the source recogniser that the user names, or train one on the source corpus.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    reader : FrameReader
        Makes the frames.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    pathlib.Path
        Its folder.

    Example
    -------
    >>> source_recogniser({"source_recogniser": "given"}, None)
    PosixPath('given')
    """
    if hparams["source_recogniser"] is not None:
        return Path(hparams["source_recogniser"])
    return trained_recogniser(hparams, "source", reader, run_opts)


def trained_recogniser(hparams: Mapping, role: str, reader: FrameReader, run_opts: Mapping | None = None) -> Path:
    """Prepare a corpus, store its frames, train its classifier; each step is skipped when done.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    role : str
        `source` or `teacher`.
    reader : FrameReader
        Makes the frames.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    pathlib.Path
        Folder of the recogniser.

    Example
    -------
    >>> trained_recogniser.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'trained_recogniser'
    """
    classifier = hparams[f"{role}_classifier"]
    folder = Path(classifier["output_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    # Runs side by side may share a source or a teacher: the first trains it, the others wait and find it.
    with FileLock(folder / "lock"):
        run_on_main(hparams[f"prepare_{role}"])
        store = store_frames(hparams, role, reader)
        return train_classifier(classifier, StoredFrames(store, classifier["layer"]), run_opts)


class Answers:
    """The language model's stored samples by utterance; none for an utterance that it was not asked about.

    Parameters
    ----------
    samples : Samples or None
        As `LabelStore.load` gives.
    keys : sequence of str
        Utterance ids in the order of the samples.
    k, n_classes : int
        Shape of an empty answer.

    Example
    -------
    >>> Answers(None, [], k=5, n_classes=4).of("t-a")["lalm_mask"].any()
    tensor(False)
    """

    def __init__(self, samples, keys: Sequence[str], k: int, n_classes: int):
        self.samples, self.row = samples, {key: row for row, key in enumerate(keys)}
        self.nothing = {"lalm": torch.zeros(k, n_classes), "lalm_mask": torch.zeros(k, dtype=torch.bool)}

    def of(self, utt_id: str) -> dict[str, torch.Tensor]:
        """Give the samples of one utterance.

        Parameters
        ----------
        utt_id : str
            Utterance id.

        Returns
        -------
        dict of str to torch.Tensor
            `lalm` `[K, C]` and `lalm_mask` `[K]`.
        """
        if utt_id not in self.row:
            return self.nothing
        row = self.row[utt_id]
        return {"lalm": self.samples.probs[row], "lalm_mask": self.samples.mask[row]}


def ask_teacher(
    hparams: Mapping, names: Sequence[str], store: FeatureStore, reader: FrameReader, run_opts: Mapping | None = None
) -> Answers:
    """Collect what the chosen methods need of the API teacher's answers; only what the label store lacks is asked.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    names : sequence of str
        Chosen methods.
    store : FeatureStore
        Frames of the target; knows the content hash that is the answers' key.
    reader : FrameReader
        Makes frames, should a teacher have to be trained first.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Returns
    -------
    Answers
        Of the utterances that some method needs.

    Raises
    ------
    LalmError
        If the API is down or refuses the key.

    Example
    -------
    >>> ask_teacher.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'ask_teacher'
    """
    methods = hparams["adaptation"]["methods"]
    splits = sorted({split for name in names for split in methods[name].answers_for})
    paths = [unlabelled(f"{hparams['target_manifests']}/{split}.json") for split in splits]
    wavs = {key: row["wav"] for path in paths for key, row in encoded_rows(path, store).items()}
    k, labels = hparams["lalm_samples"], hparams["labels"]
    if not wavs:
        return Answers(None, [], k, len(labels))
    prompt = Prompt(labels, hparams["lalm_answer_form"])
    sampling = {"temperature": hparams["lalm_temperature"], "seed": 0}
    hashes = [store.rows[key].audio for key in wavs]
    with LabelStore(hparams["label_store"]) as answers, teacher_api(hparams, reader, run_opts) as (serve, endpoint):
        query = Query.of(prompt, hparams["lalm_model"], hparams["lalm_base_url"] or LOOPBACK, sampling, endpoint)
        missing = missing_answers(answers, query, dict(zip(wavs, hashes, strict=True)), k)
        if missing:
            # Runs side by side may share a store: the first asks, the others wait and find its answers.
            alone = one_at_a_time(f"{hparams['label_store']}.lock")
            with alone, serve() as base_url, quiet(*EVERY_REQUEST):
                client = LalmClient(base_url, hparams["lalm_model"])
                query = Query.of(prompt, hparams["lalm_model"], client.base_url, sampling, endpoint)
                missing = missing_answers(answers, query, dict(zip(wavs, hashes, strict=True)), k)
                asked = [(key, wavs[key]) for key in missing]
                collected = collect(asked, prompt, client, answers, query, k, hparams["lalm_concurrency"])
            logger.info(collected.summary())
        else:
            logger.info("%s: all answers are stored, nothing is asked.", hparams["label_store"])
        samples = answers.load(query, hashes, k)
    report_answers(samples, hparams["temperature"])
    return Answers(samples, list(wavs), k, len(labels))


@contextlib.contextmanager
def one_at_a_time(path: str | Path):
    """Hold a lock that other processes respect; say so before waiting for it.

    Parameters
    ----------
    path : str or pathlib.Path
        Lock file; it stays behind, empty.

    Example
    -------
    >>> import tempfile
    >>> with one_at_a_time(Path(tempfile.mkdtemp()) / "lock"):
    ...     print("alone")
    alone
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: another run is at it, waiting.", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def missing_answers(answers: LabelStore, query: Query, hashes: Mapping[str, str], k: int) -> list[str]:
    """List utterances that lack samples, asked about or not.

    Parameters
    ----------
    answers : LabelStore
        The store.
    query : Query
        The key.
    hashes : mapping of str to str
        Content hash by utterance id.
    k : int
        Samples wanted.

    Returns
    -------
    list of str
        Utterance ids.

    Example
    -------
    >>> missing_answers.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'missing_answers'
    """
    have = answers.have(query)
    return [key for key, audio in hashes.items() if any((audio, i) not in have for i in range(k))]


@contextlib.contextmanager
def teacher_api(hparams: Mapping, reader: FrameReader, run_opts: Mapping | None = None):
    """Say who answers, and how to reach it: the API that the user names, or a classifier served here.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    reader : FrameReader
        Makes frames, should a teacher have to be trained.
    run_opts : mapping, optional
        SpeechBrain's run options.

    Yields
    ------
    serve : callable
        Gives a context manager of the base URL; a local server starts only when it is entered.
    endpoint : str or None
        Identity of whoever answers: `None` for the URL itself, else one that follows the served weights.

    Example
    -------
    >>> with teacher_api({"lalm_base_url": "http://127.0.0.1:9/v1"}, None) as (serve, endpoint):
    ...     with serve() as base_url:
    ...         print(base_url, endpoint)
    http://127.0.0.1:9/v1 None
    """
    if hparams["lalm_base_url"] is not None:
        yield (lambda: contextlib.nullcontext(hparams["lalm_base_url"])), None
        return
    folder = trained_recogniser(hparams, "teacher", reader, run_opts)
    yield functools.partial(served, folder, hparams["lalm_model"]), f"local:{recogniser_digest(folder)}"


@contextlib.contextmanager
def served(folder: Path, model_name: str):
    """Serve a recogniser on a free port of the loopback interface.

    Parameters
    ----------
    folder : pathlib.Path
        Of the recogniser.
    model_name : str
        Name it answers to.

    Yields
    ------
    str
        Base URL.

    Example
    -------
    >>> served.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'served'
    """
    with EmotionServer(EmotionRecognizer.from_hparams(folder), model_name) as server:
        logger.info("serving %s at %s", folder, server.base_url)
        yield server.base_url


def report_answers(samples, temperature: float) -> None:
    """Log how many samples there are and of what kind; warn when mutual information loses its meaning.

    Parameters
    ----------
    samples : Samples
        As `LabelStore.load` gives.
    temperature : float
        tau of the fusion.

    Example
    -------
    >>> report_answers.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'report_answers'
    """
    present = samples.mask.sum().item()
    logger.info("teacher: %d samples of %d wanted", present, samples.mask.numel())
    one_hot = (samples.probs.amax(-1) > 0.999)[samples.mask].float().mean().item() if present else 0.0
    if one_hot > 0.5:
        logger.warning(
            "%.0f %% of the teacher's samples are single labels: their mutual information is the entropy of the mean, "
            "and --temperature %s may leave the teacher little weight (try 1.0).",
            100 * one_hot,
            temperature,
        )


def report(hparams: Mapping, name: str, predictions: Mapping, n_train: int) -> None:
    """Score one method's predictions and write its results; here the target's labels are opened, if there are any.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    name : str
        The method.
    predictions : mapping
        As `adapt` gives.
    n_train : int
        Size of the adaptation set.

    Example
    -------
    >>> report.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'report'
    """
    method, target = hparams["adaptation"]["methods"][name], Path(hparams["target_manifests"])
    folder, rule = Path(hparams["output_folder"]) / name, hparams["adaptation"]["selection"]
    scored = evaluate(predictions, target / "test.json", hparams["labels"])
    if scored["UA"] is None:
        logger.warning(
            "%s has no labels, nothing is scored: see %s.", target / "test.json", folder / "predictions.json"
        )
    snapshots = Snapshots(folder, rule).saved()
    write_results(
        folder,
        scored,
        hparams["labels"],
        method=name,
        source=hparams["source"],
        target=hparams["target"],
        teacher=hparams["teacher"] if hparams["lalm_base_url"] is None else hparams["lalm_model"],
        seed=hparams["seed"],
        encoder=f"{ENCODERS.get(hparams['encoder'], hparams['encoder'])}, layer {hparams['layer']}, frozen",
        protocol=protocol(hparams["labels"], target),
        selection=known_rule(rule)[1],
        n_train=n_train if method.trains or "adapt" in method.answers_for else 0,
        diversity_weight=hparams["diversity_weight"],
        temperature=hparams["temperature"],
        steps=chosen_snapshot(snapshots, rule)["step"] if snapshots else 0,
        snapshots=score_snapshots(snapshots, target / "test.json", hparams["labels"]),
    )


def protocol(labels: Sequence[str], manifests: Path) -> str:
    """Say how the target was split.

    Parameters
    ----------
    labels : sequence of str
        The classes.
    manifests : pathlib.Path
        Folder of `adapt` and `test`.

    Returns
    -------
    str
        Number of classes and speakers, and whether the two sets share any.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, text in (("corpus", '{"data_root": "/toy"}'), ("adapt_unlabelled", "{}"), ("test_unlabelled", "{}")):
    ...     atomic_write(folder / f"{name}.json", text)
    >>> protocol(["angry", "sad"], folder)
    'speaker-independent, 2 classes, 0 speakers to adapt, 0 others to test'
    """
    paths = [unlabelled(manifests / f"{split}.json") for split in ("adapt", "test")]
    adapt, test = ({row["speaker"] for row in read_manifest(path).values()} for path in paths)
    if adapt & test:
        return f"adapted and predicted on the same speakers, {len(labels)} classes, {len(adapt | test)} speakers"
    return f"speaker-independent, {len(labels)} classes, {len(adapt)} speakers to adapt, {len(test)} others to test"


def summary(hparams: Mapping, names: Sequence[str]) -> str:
    """Bring the results of a run together: `results.json` and `results.md` in the output folder.

    Parameters
    ----------
    hparams : mapping
        The recipe's.
    names : sequence of str
        Methods of this run. One gives its own record in `results.json`, several a list of records; `results.md` also
        shows methods that earlier runs left in the same folder.

    Returns
    -------
    str
        The table.

    Example
    -------
    >>> summary.__name__  # runs in `recipes/RAVDESS/mifuse/train.py`
    'summary'
    """
    folder = Path(hparams["output_folder"])
    records = [json.loads((folder / name / "results.json").read_text()) for name in names]
    atomic_write(folder / "results.json", json.dumps(records if len(records) > 1 else records[0], indent=1))
    return side_by_side(folder, list(hparams["adaptation"]["methods"]))
