"""The API teacher of a recipe: what it is asked, what that costs, and what it answered."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from speechbrain.utils.distributed import run_on_main

from speechbrain_mifuse.adaptation.uncertainty import single_label_share
from speechbrain_mifuse.brains.training import one_at_a_time
from speechbrain_mifuse.corpora.manifest import (
    unlabelled,
)
from speechbrain_mifuse.experiments.features import device_of, open_reader
from speechbrain_mifuse.experiments.source import prepare_role, trained_recogniser
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.extract import FrameReader
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer, recogniser_digest
from speechbrain_mifuse.lalm.card import Needs, check, read_card
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.hashes import HashCache, Known
from speechbrain_mifuse.lalm.limits import Budget
from speechbrain_mifuse.lalm.plan import Plan, known_recordings, make_plan, spent_before
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import DEFAULT_TEMPLATE, Prompt
from speechbrain_mifuse.lalm.store import KINDS, LabelStore, Query, Samples
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import quiet
from speechbrain_mifuse.zero_shot import ZERO_SHOT
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel, refuse_known_corpus
from speechbrain_mifuse.zero_shot.own_dual_encoder import open_alm
from speechbrain_mifuse.zero_shot.prompts import read_prompts
from speechbrain_mifuse.zero_shot.scorer import embed_manifests
from speechbrain_mifuse.zero_shot.teacher import teacher_samples

if TYPE_CHECKING:
    from speechbrain_mifuse.lalm.client import LalmClient

logger = logging.getLogger(__name__)

# Stands in the place of the address while no server runs; the identity of a served teacher is its endpoint.
LOOPBACK = "http://127.0.0.1/v1"
# Draws the prompts of an audio-text teacher, whatever the run's seed: an API's answers are one for all seeds, too.
TEACHER_SEED = 0
# Loggers that tell of each request, some with its whole audio.
EVERY_REQUEST = ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "speechbrain_mifuse.inference.server")


class Answers:
    """The language model's stored samples by utterance; none for an utterance that it was not asked about."""

    def __init__(self, samples, keys: Sequence[str], k: int, n_classes: int, teacher: Mapping | None = None):
        self.samples, self.row, self.teacher = samples, {key: row for row, key in enumerate(keys)}, teacher
        self.nothing = {"lalm": torch.zeros(k, n_classes), "lalm_mask": torch.zeros(k, dtype=torch.bool)}

    def of(self, utt_id: str) -> dict[str, torch.Tensor]:
        """Give the samples of one utterance."""
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
    """
    wavs = wanted_recordings(hparams, names, store)
    k, labels = hparams["lalm_samples"], hparams["labels"]
    if not wavs:
        return Answers(None, [], k, len(labels))
    if hparams["teacher"] == ZERO_SHOT:
        model = zero_shot_teacher(hparams, run_opts)
        samples = zero_shot_samples(hparams, model, list(wavs))
        return Answers(samples, list(wavs), k, len(labels), model.fingerprint())
    hashes = {key: store.rows[key].audio for key in wavs}
    with teacher_api(hparams, reader, run_opts) as (serve, endpoint):
        samples = run_on_main(collected, args=[hparams, wavs, hashes, serve, endpoint])
    report_answers(samples, hparams["temperature"])
    return Answers(samples, list(wavs), k, len(labels))


def collected(
    hparams: Mapping, wavs: Mapping[str, str], hashes: Mapping[str, str], serve, endpoint: str | None
) -> Samples:
    """Fill the label store of a run and load what it needs from there."""
    with LabelStore(hparams["label_store"]) as answers:
        query, told = fill_label_store(hparams, wavs, hashes, answers, serve, endpoint)
        logger.info(told)
        return answers.load(query, list(hashes.values()), hparams["lalm_samples"])


def zero_shot_teacher(hparams: Mapping, run_opts: Mapping | None = None) -> AudioTextModel:
    """Load the audio-text model that is the teacher on this machine, in the place of an API."""
    if hparams["teacher_alm"] is None:
        raise UserError(
            f"--teacher {ZERO_SHOT}: which one? Pass --teacher_alm FOLDER, as recipes/*/dual_encoder/train.py writes "
            "it, or the folder or hub id of a CLAP-like model."
        )
    options = {"device": device_of(run_opts), "flag": "--teacher_alm"}
    model = open_alm(hparams["teacher_alm"], trust_remote_code=hparams["teacher_alm_trust_remote_code"], **options)
    refuse_known_corpus(model.trained_on, hparams["target"], "--teacher_alm")
    return model


def zero_shot_samples(hparams: Mapping, model: AudioTextModel, keys: Sequence[str]) -> Samples:
    """Let an audio-text model answer about recordings."""
    manifests = [unlabelled(f"{hparams['target_manifests']}/{split}.json") for split in ("adapt", "test")]
    store = embed_manifests(model, manifests, 1, hparams["feature_folder"], hparams["target"])
    reference = list(encoded_rows(manifests[0], store))
    prompts, k = read_prompts(hparams["teacher_prompts"]), hparams["lalm_samples"]
    probs = teacher_samples(model, store, keys, prompts, hparams["labels"], k, TEACHER_SEED, reference)
    there = torch.ones(probs.shape[:2])
    return Samples(probs, there.bool(), (there * KINDS.index("distribution")).to(torch.int8))


def wanted_recordings(hparams: Mapping, names: Sequence[str], store: FeatureStore | None = None) -> dict[str, str]:
    """List the target's recordings that some method needs answers about."""
    methods = hparams["adaptation"]["methods"]
    splits = sorted({split for name in names for split in methods[name].answers_for})
    paths = [unlabelled(f"{hparams['target_manifests']}/{split}.json") for split in splits]
    return {key: row["wav"] for path in paths for key, row in encoded_rows(path, store).items()}


def profile_of(hparams: Mapping) -> Profile:
    """Give the provider's profile, with what flags say otherwise."""
    flags = {name: hparams[f"lalm_{name}"] for name in ("base_url", "model", "answer_form", "concurrency")}
    values = hparams.get("lalm_profile") or {}
    if flags["base_url"] is None and values.get("base_url") is not None:
        values = {}  # a classifier served here in place of the provider, whose limits do not hold for it
    return Profile.of(values, **flags)


def question_of(hparams: Mapping, profile: Profile) -> Prompt:
    """Give the question that the language model is asked."""
    forms = {"audio_part": profile.audio_part, "constraint": profile.constraint}
    template, *variants = hparams.get("lalm_prompts") or [DEFAULT_TEMPLATE]
    forms.update(variants=variants, shuffle_labels=bool(hparams.get("lalm_shuffle_labels")))
    return Prompt(hparams["labels"], profile.answer_form, template, **forms)


def query_of(hparams: Mapping, profile: Profile, base_url: str, endpoint: str | None = None) -> Query:
    """Give the key of the answers in the label store."""
    sampling = {"temperature": hparams["lalm_temperature"], "seed": 0, **profile.sampling}
    return Query.of(question_of(hparams, profile), profile.model, base_url, sampling, endpoint)


def client_of(hparams: Mapping, profile: Profile, base_url: str, answers: LabelStore, query: Query) -> LalmClient:
    """Make the client, with a budget from which stored answers to the same query are deducted."""
    from speechbrain_mifuse.lalm.client import LalmClient  # imports the openai package, which takes a second

    limit = hparams.get("lalm_budget")
    budget = Budget(limit, profile.price)
    if limit is not None and profile.output_limit(profile.sampling) is None:
        raise UserError(
            "--lalm_budget needs answers of limited length: add `sampling: {max_tokens: 200}` to the lalm_profile"
        )
    budget.spent = spent_before(answers, query, profile.price)
    return LalmClient.of(profile, base_url, budget)


def require_capabilities(hparams: Mapping, profile: Profile, longest: float | None = None) -> None:
    """Hold what a collection needs against the server's capability card, if there is one."""
    if hparams.get("lalm_card") is None:
        return
    card, varied = read_card(hparams["lalm_card"]), question_of(hparams, profile).varies
    sent = None if profile.longest_audio else longest
    needs = Needs(profile, hparams["lalm_samples"], hparams["lalm_temperature"], sent, varied)
    for line in check(card, needs):
        logger.warning("%s cannot tell: %s", hparams["lalm_card"], line)


def fill_label_store(
    hparams: Mapping, wavs: Mapping[str, str], hashes: Mapping[str, str], answers: LabelStore, serve, endpoint
) -> tuple[Query, str]:
    """Ask for what the label store lacks."""
    profile, k = profile_of(hparams), hparams["lalm_samples"]
    query = query_of(hparams, profile, profile.base_url or LOOPBACK, endpoint)
    if not missing_answers(answers, query, hashes, k):
        return query, f"{hparams['label_store']}: all answers are stored, nothing is asked."
    require_capabilities(hparams, profile)
    # Runs side by side may share a store: the first asks, the others wait and find its answers.
    with one_at_a_time(f"{hparams['label_store']}.lock"), serve() as base_url, quiet(*EVERY_REQUEST):
        query = query_of(hparams, profile, base_url, endpoint)
        asked = [(key, wavs[key]) for key in missing_answers(answers, query, hashes, k)]
        client, prompt = client_of(hparams, profile, base_url, answers, query), question_of(hparams, profile)
        deadline = hparams.get("lalm_deadline")
        found = collect(asked, prompt, client, answers, query, k, profile.concurrency, deadline=deadline)
    return query, found.summary()


def collect_answers(hparams: Mapping, names: Sequence[str], run_opts: Mapping | None = None, dry_run=False) -> None:
    """Print the plan and collect the answers that a recipe needs, without training or encoding anything."""
    if hparams["teacher"] == ZERO_SHOT:
        raise UserError(f"--teacher {ZERO_SHOT}: it answers within the recipe itself, and nothing is to be collected.")
    run_on_main(hparams["prepare_target"])
    wavs = wanted_recordings(hparams, names)
    if not wavs:
        raise UserError(f"--method: {', '.join(names)} needs no answers of a language model.")
    store = Path(hparams["label_store"])
    store.parent.mkdir(parents=True, exist_ok=True)
    with HashCache.beside(store) as cache:
        known = known_recordings(wavs, cache)
    print(planned(hparams, known, store).told(), flush=True)
    longest = max((recording.seconds for recording in known.values()), default=None)
    require_capabilities(hparams, profile_of(hparams), longest)
    if dry_run:
        return
    reader = None
    if hparams["lalm_base_url"] is None:
        prepare_role(hparams, "teacher")
        reader = open_reader(hparams, run_opts)
    with LabelStore(store) as answers, teacher_api(hparams, reader, run_opts) as (serve, endpoint):
        hashes = {key: recording.audio for key, recording in known.items()}
        query, told = fill_label_store(hparams, wavs, hashes, answers, serve, endpoint)
        kinds = ", ".join(f"{count} {kind}" for kind, count in answers.counts(query).items() if count)
    print(f"{told}\n{store}: {kinds or 'no answers'}", flush=True)


def planned(hparams: Mapping, known: Mapping[str, Known], store: Path) -> Plan:
    """Plan a collection by what a label store lacks, making none and training no teacher."""
    profile, endpoint = profile_of(hparams), None
    if profile.base_url is None:
        try:
            endpoint = f"local:{recogniser_digest(hparams['teacher_classifier']['output_folder'])}"
        except UserError:
            endpoint = "local:not trained yet"
    base_url = profile.base_url or LOOPBACK
    query = query_of(hparams, profile, base_url, endpoint)
    with LabelStore(store if store.exists() else ":memory:") as answers:
        client = client_of(hparams, profile, base_url, answers, query)
        return make_plan(known, question_of(hparams, profile), client, answers, query, hparams["lalm_samples"])


def missing_answers(answers: LabelStore, query: Query, hashes: Mapping[str, str], k: int) -> list[str]:
    """List utterances that lack samples, asked about or not."""
    have = answers.have(query)
    return [key for key, audio in hashes.items() if any((audio, i) not in have for i in range(k))]


@contextlib.contextmanager
def teacher_api(hparams: Mapping, reader: FrameReader, run_opts: Mapping | None = None):
    """Say who answers, and how to reach it: the API that the user names, or a classifier served here."""
    if hparams["lalm_base_url"] is not None:
        yield (lambda: contextlib.nullcontext(hparams["lalm_base_url"])), None
        return
    folder = hparams.get("teacher_recogniser") or trained_recogniser(hparams, "teacher", reader, run_opts)
    yield functools.partial(served, folder, hparams["lalm_model"]), f"local:{recogniser_digest(folder)}"


@contextlib.contextmanager
def served(folder: Path, model_name: str):
    """Serve a recogniser on a free port of the loopback interface."""
    from speechbrain_mifuse.inference.server import EmotionServer  # imports aiohttp

    with EmotionServer(EmotionRecognizer.from_hparams(folder), model_name) as server:
        logger.info("serving %s at %s", folder, server.base_url)
        yield server.base_url


def report_answers(samples, temperature: float) -> None:
    """Log how many samples there are and of what kind; warn when mutual information loses its meaning."""
    present = samples.mask.sum().item()
    logger.info("teacher: %d samples of %d wanted", present, samples.mask.numel())
    one_hot = single_label_share(samples.probs, samples.mask)
    if one_hot > 0.5:
        logger.warning(
            "%.0f %% of the teacher's samples are single labels: their mutual information is the entropy of the mean, "
            "and --temperature %s may leave the teacher little weight (try 1.0).",
            100 * one_hot,
            temperature,
        )
