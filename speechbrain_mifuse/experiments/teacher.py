"""The API teacher of a recipe: what it is asked, what that costs, and what it answered."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from speechbrain_mifuse.adaptation.method import AdaptationMethod
from speechbrain_mifuse.adaptation.uncertainty import single_label_share
from speechbrain_mifuse.brains.training import one_at_a_time
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.experiments.features import CorpusSettings, device_of
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import recogniser_digest
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
from speechbrain_mifuse.zero_shot import AUDIO_TEXT_TEACHER
from speechbrain_mifuse.zero_shot.audio_text import AudioTextModel, refuse_known_corpus
from speechbrain_mifuse.zero_shot.own_dual_encoder import alm_name, open_alm
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


@dataclass(frozen=True)
class TeacherSettings:
    """Who answers about the target's recordings, what is asked, and what may be spent.

    `folder` is where the teacher's classifier is trained where neither an API, nor `recogniser`, nor `alm` is named.
    `temperature` and `samples` are of the answers; `budget` is in the currency of the prices, `deadline` in seconds.
    """

    name: str
    folder: Path
    profile: Profile
    prompt: Prompt
    label_store: Path
    samples: int
    temperature: float
    budget: float | None = None
    deadline: float | None = None
    card: str | None = None
    recogniser: Path | None = None
    alm: str | None = None
    alm_trust_remote_code: bool = False
    alm_prompts: str | None = None

    @classmethod
    def of(cls, hparams: Mapping, recogniser: Path | None = None) -> TeacherSettings:
        """Read them from a recipe's hparams; `recogniser` is a folder that is served on this machine."""
        profile = profile_of(
            hparams["lalm_profile"],
            base_url=hparams["lalm_base_url"],
            model=hparams["lalm_model"],
            answer_form=hparams["lalm_answer_form"],
            concurrency=hparams["lalm_concurrency"],
        )
        return cls(
            name=hparams["teacher"],
            folder=Path(hparams["teacher_folder"]),
            profile=profile,
            prompt=prompt_of(profile, hparams["labels"], hparams["lalm_prompts"], hparams["lalm_shuffle_labels"]),
            label_store=Path(hparams["label_store"]),
            samples=hparams["lalm_samples"],
            temperature=hparams["lalm_temperature"],
            budget=hparams["lalm_budget"],
            deadline=hparams["lalm_deadline"],
            card=hparams["lalm_card"],
            recogniser=recogniser,
            alm=hparams["teacher_alm"],
            alm_trust_remote_code=hparams["teacher_alm_trust_remote_code"],
            alm_prompts=hparams["teacher_prompts"],
        )

    @property
    def is_local(self) -> bool:
        """Whether a classifier is served on this machine in the place of an API."""
        return self.profile.base_url is None and self.name != AUDIO_TEXT_TEACHER

    @property
    def base_url(self) -> str:
        """Address of the API; a stand-in while no server runs."""
        return self.profile.base_url or LOOPBACK

    def told(self) -> str:
        """Say who the teacher is, for results."""
        if self.name == AUDIO_TEXT_TEACHER:
            # A run of which no method asks the teacher need not say which model it would be.
            return AUDIO_TEXT_TEACHER if self.alm is None else alm_name(self.alm)
        return self.name if self.profile.base_url is None else self.profile.model

    def query(self, base_url: str, endpoint: str | None = None) -> Query:
        """Give the key of the answers in the label store."""
        sampling = {"temperature": self.temperature, "seed": 0, **self.profile.sampling}
        return Query.of(self.prompt, self.profile.model, base_url, sampling, endpoint)

    def client(self, base_url: str, answers: LabelStore, query: Query) -> LalmClient:
        """Make the client, with a budget from which stored answers to the same query are deducted."""
        from speechbrain_mifuse.lalm.client import LalmClient  # imports the openai package, which takes a second

        budget = Budget(self.budget, self.profile.price)
        if self.budget is not None and self.profile.output_limit(self.profile.sampling) is None:
            raise UserError(
                "--lalm_budget needs answers of limited length: add `sampling: {max_tokens: 200}` to the lalm_profile"
            )
        budget.spent = spent_before(answers, query, self.profile.price)
        return LalmClient.of(self.profile, base_url, budget)

    def require_capabilities(self, longest: float | None = None) -> None:
        """Hold what a collection needs against the server's capability card, if there is one."""
        if self.card is None:
            return
        sent = None if self.profile.longest_audio else longest
        needs = Needs(self.profile, self.samples, sent, self.prompt.varies)
        for line in check(read_card(self.card), needs):
            logger.warning("%s cannot tell: %s", self.card, line)


def profile_of(values: Mapping | None, **flags) -> Profile:
    """Give the provider's profile, with what flags say otherwise."""
    values = values or {}
    if flags["base_url"] is None and values.get("base_url") is not None:
        values = {}  # a classifier served here in place of the provider, whose limits do not hold for it
    return Profile.of(values, **flags)


def prompt_of(profile: Profile, labels: Sequence[str], templates: Sequence[str] | None, shuffle_labels) -> Prompt:
    """Give the question that the language model is asked."""
    template, *variants = templates or [DEFAULT_TEMPLATE]
    forms = {"audio_part": profile.audio_part, "constraint": profile.constraint}
    return Prompt(
        labels, profile.answer_form, template, variants=variants, shuffle_labels=bool(shuffle_labels), **forms
    )


class Answers:
    """The teacher's samples by utterance; none for an utterance that it was not asked about."""

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
    teacher: TeacherSettings,
    methods: Iterable[AdaptationMethod],
    target: CorpusSettings,
    store: FeatureStore,
    train: Callable[[], Path],
    run_opts: Mapping | None = None,
) -> Answers:
    """Collect what methods need of the teacher's answers; only what the label store lacks is asked.

    Parameters
    ----------
    teacher : TeacherSettings
        Who is asked, and how.
    methods : iterable of AdaptationMethod
        Say by `answers_for` of which splits they need answers.
    target : CorpusSettings
        Whose recordings are asked about.
    store : FeatureStore
        Frames of the target; knows the content hash that is the answers' key.
    train : callable
        Trains the classifier that is served in the place of an API, or finds it trained; gives its folder.
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
    wavs = wanted_recordings(target.manifests, methods, store)
    k, n_classes = teacher.samples, len(teacher.prompt.labels)
    if not wavs:
        return Answers(None, [], k, n_classes)
    if teacher.name == AUDIO_TEXT_TEACHER:
        model = zero_shot_teacher(teacher, target.name, run_opts)
        samples = zero_shot_samples(teacher, model, target, list(wavs))
        return Answers(samples, list(wavs), k, n_classes, model.fingerprint())
    hashes = {key: store.rows[key].audio for key in wavs}
    with teacher_api(teacher, train) as (serve, endpoint):
        samples = collected(teacher, wavs, hashes, serve, endpoint)
    return Answers(samples, list(wavs), k, n_classes)


def collected(
    teacher: TeacherSettings, wavs: Mapping[str, str], hashes: Mapping[str, str], serve, endpoint: str | None
) -> Samples:
    """Fill the label store of a run and load what it needs from there."""
    with LabelStore(teacher.label_store) as answers:
        query, told = fill_label_store(teacher, wavs, hashes, answers, serve, endpoint)
        logger.info(told)
        return answers.load(query, list(hashes.values()), teacher.samples)


def zero_shot_teacher(teacher: TeacherSettings, target: str, run_opts: Mapping | None = None) -> AudioTextModel:
    """Load the audio-text model that is the teacher on this machine, in the place of an API."""
    if teacher.alm is None:
        raise UserError(
            f"--teacher {AUDIO_TEXT_TEACHER}: which one? Pass --teacher_alm FOLDER, as "
            "recipes/*/dual_encoder/train.py writes it, or the folder or hub id of a CLAP-like model."
        )
    options = {"device": device_of(run_opts), "flag": "--teacher_alm"}
    model = open_alm(teacher.alm, trust_remote_code=teacher.alm_trust_remote_code, **options)
    refuse_known_corpus(model.trained_on, target, "--teacher_alm")
    return model


def zero_shot_samples(
    teacher: TeacherSettings, model: AudioTextModel, target: CorpusSettings, keys: Sequence[str]
) -> Samples:
    """Let an audio-text model answer about recordings."""
    manifests = [unlabelled(target.manifests / f"{split}.json") for split in ("adapt", "test")]
    store = embed_manifests(model, manifests, 1, target.feature_folder, target.name)
    reference = list(encoded_rows(manifests[0], store))
    prompts, labels = read_prompts(teacher.alm_prompts), teacher.prompt.labels
    probs = teacher_samples(model, store, keys, prompts, labels, teacher.samples, TEACHER_SEED, reference)
    there = torch.ones(probs.shape[:2])
    return Samples(probs, there.bool(), (there * KINDS.index("distribution")).to(torch.int8))


def wanted_recordings(
    manifests: Path, methods: Iterable[AdaptationMethod], store: FeatureStore | None = None
) -> dict[str, str]:
    """List the target's recordings that some method needs answers about."""
    splits = sorted({split for method in methods for split in method.answers_for})
    paths = [unlabelled(manifests / f"{split}.json") for split in splits]
    return {key: row["wav"] for path in paths for key, row in encoded_rows(path, store).items()}


def fill_label_store(
    teacher: TeacherSettings, wavs: Mapping[str, str], hashes: Mapping[str, str], answers: LabelStore, serve, endpoint
) -> tuple[Query, str]:
    """Ask for what the label store lacks."""
    k, query = teacher.samples, teacher.query(teacher.base_url, endpoint)
    if not missing_answers(answers, query, hashes, k):
        return query, f"{teacher.label_store}: all answers are stored, nothing is asked."
    teacher.require_capabilities()
    # Runs side by side may share a store: the first asks, the others wait and find its answers.
    with one_at_a_time(f"{teacher.label_store}.lock"), serve() as base_url:
        query = teacher.query(base_url, endpoint)
        asked = [(key, wavs[key]) for key in missing_answers(answers, query, hashes, k)]
        client, concurrency = teacher.client(base_url, answers, query), teacher.profile.concurrency
        found = collect(asked, teacher.prompt, client, answers, query, k, concurrency, deadline=teacher.deadline)
    return query, found.summary()


def collect_answers(
    teacher: TeacherSettings,
    methods: Mapping[str, AdaptationMethod],
    target: CorpusSettings,
    train: Callable[[], Path],
    dry_run=False,
) -> None:
    """Print the plan and collect the answers that a recipe needs, without training or encoding the target."""
    if teacher.name == AUDIO_TEXT_TEACHER:
        raise UserError(
            f"--teacher {AUDIO_TEXT_TEACHER}: it answers within the recipe itself, and nothing is to be collected."
        )
    target.prepare()
    wavs = wanted_recordings(target.manifests, methods.values())
    if not wavs:
        raise UserError(f"--method: {', '.join(methods)} needs no answers of a language model.")
    store = teacher.label_store
    store.parent.mkdir(parents=True, exist_ok=True)
    with HashCache.beside(store) as cache:
        known = known_recordings(wavs, cache)
    print(planned(teacher, known).told(), flush=True)
    teacher.require_capabilities(max((recording.seconds for recording in known.values()), default=None))
    if dry_run:
        return
    with LabelStore(store) as answers, teacher_api(teacher, train) as (serve, endpoint):
        hashes = {key: recording.audio for key, recording in known.items()}
        query, told = fill_label_store(teacher, wavs, hashes, answers, serve, endpoint)
        kinds = ", ".join(f"{count} {kind}" for kind, count in answers.counts(query).items() if count)
    print(f"{told}\n{store}: {kinds or 'no answers'}", flush=True)


def planned(teacher: TeacherSettings, known: Mapping[str, Known]) -> Plan:
    """Plan a collection by what a label store lacks, making none and training no teacher."""
    endpoint, store = None, teacher.label_store
    if teacher.is_local:
        try:
            endpoint = f"local:{recogniser_digest(teacher.folder / 'recogniser')}"
        except UserError:
            endpoint = "local:not trained yet"
    query = teacher.query(teacher.base_url, endpoint)
    with LabelStore(store if store.exists() else ":memory:") as answers:
        client = teacher.client(teacher.base_url, answers, query)
        return make_plan(known, teacher.prompt, client, answers, query, teacher.samples)


def missing_answers(answers: LabelStore, query: Query, hashes: Mapping[str, str], k: int) -> list[str]:
    """List utterances that lack samples, asked about or not."""
    have = answers.have(query)
    return [key for key, audio in hashes.items() if any((audio, i) not in have for i in range(k))]


@contextlib.contextmanager
def teacher_api(teacher: TeacherSettings, train: Callable[[], Path]):
    """Say who answers, and how to reach it: the API that the user names, or a classifier served here."""
    if not teacher.is_local:
        yield (lambda: contextlib.nullcontext(teacher.profile.base_url)), None
        return
    folder = teacher.recogniser or train()
    yield functools.partial(served, folder, teacher.profile.model), f"local:{recogniser_digest(folder)}"


@contextlib.contextmanager
def served(folder: Path, model_name: str):
    """Serve a recogniser on a free port of the loopback interface."""
    from speechbrain_mifuse.inference.server import EmotionServer  # imports aiohttp

    recogniser = EmotionRecognizer.from_hparams(folder)
    # The server logs each request.
    with quiet("speechbrain_mifuse.inference.server"), EmotionServer(recogniser, model_name) as server:
        logger.info("serving %s at %s", folder, server.base_url)
        yield server.base_url


def report_answers(answers: Answers, temperature: float) -> None:
    """Log how many samples an API gave and of what kind; warn when mutual information loses its meaning."""
    samples = answers.samples
    # An audio-text model says of itself what it is, and answers everything.
    if samples is None or answers.teacher is not None:
        return
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
