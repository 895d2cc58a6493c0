"""The API teacher of a recipe: what it is asked, what that costs, and what it answered."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from speechbrain_mifuse.adaptation.method import AdaptationMethod
from speechbrain_mifuse.adaptation.uncertainty import single_label_share
from speechbrain_mifuse.brains.training import exclusive_lock
from speechbrain_mifuse.corpora.manifest import unlabelled
from speechbrain_mifuse.experiments.features import CorpusSettings, device_of
from speechbrain_mifuse.features.dataset import encoded_rows
from speechbrain_mifuse.features.store import FeatureStore
from speechbrain_mifuse.inference.recognizer import EmotionRecognizer
from speechbrain_mifuse.inference.recognizer_folder import recogniser_digest
from speechbrain_mifuse.lalm.card import Needs, check, read_card
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.hashes import HashCache
from speechbrain_mifuse.lalm.limits import Budget
from speechbrain_mifuse.lalm.plan import known_recordings, make_plan, spent_before
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


@dataclass(frozen=True)
class ApiTeacher:
    """A language model behind an API, or a classifier that is served on this machine where no address is given.

    What has the name of a recipe's key is its value. `recogniser` is the folder of a classifier to serve; without it
    one is trained in `teacher_folder`.
    """

    name: str
    teacher_folder: Path
    profile: Profile
    prompt: Prompt
    label_store: Path
    lalm_samples: int
    lalm_temperature: float
    lalm_budget: float | None = None
    lalm_deadline: float | None = None
    lalm_card: str | None = None
    recogniser: Path | None = None

    @property
    def labels(self) -> Sequence[str]:
        """The classes that it is asked about."""
        return self.prompt.labels

    @property
    def serves_classifier(self) -> bool:
        """Whether a classifier is served on this machine in the place of an API."""
        return self.profile.base_url is None

    @property
    def display_name(self) -> str:
        """Name of the teacher in results."""
        return self.name if self.serves_classifier else self.profile.model

    def query(self, endpoint: str | None = None, base_url: str | None = None) -> Query:
        """Give the key of the answers in the label store."""
        sampling = {"temperature": self.lalm_temperature, "seed": 0, **self.profile.sampling}
        return Query.of(
            self.prompt, self.profile.model, base_url or self.profile.base_url or LOOPBACK, sampling, endpoint
        )

    def client(self, answers: LabelStore, query: Query) -> LalmClient:
        """Make the client, with a budget from which stored answers to the same query are deducted."""
        from speechbrain_mifuse.lalm.client import LalmClient  # imports the openai package, which takes a second

        budget = Budget(self.lalm_budget, self.profile.price)
        if self.lalm_budget is not None and self.profile.output_limit(self.profile.sampling) is None:
            raise UserError(
                "--lalm_budget needs answers of limited length: add `sampling: {max_tokens: 200}` to the lalm_profile"
            )
        budget.spent = spent_before(answers, query, self.profile.price)
        return LalmClient.of(self.profile, query.base_url, budget)

    def require_capabilities(self, longest: float | None = None) -> None:
        """Hold what a collection needs against the server's capability card, if there is one."""
        if self.lalm_card is None:
            return
        sent = None if self.profile.longest_audio else longest
        needs = Needs(self.profile, self.lalm_samples, sent, self.prompt.varies)
        for line in check(read_card(self.lalm_card), needs):
            logger.warning("%s cannot tell: %s", self.lalm_card, line)

    def answer(self, wavs: Mapping[str, str], target: CorpusSettings, store, train, run_opts=None) -> Answers:
        """Ask for what the label store lacks, and load the answers about some recordings from there."""
        hashes = {key: store.rows[key].audio for key in wavs}
        with LabelStore(self.label_store) as answers:
            query, summary = fill_label_store(self, wavs, hashes, answers, train)
            logger.info(summary)
            samples = answers.load(query, list(hashes.values()), self.lalm_samples)
        return Answers(samples, list(wavs), self.lalm_samples, len(self.labels))


@dataclass(frozen=True)
class AudioTextTeacher:
    """An audio-text model on this machine in the place of an API; the names of its fields are a recipe's keys."""

    labels: Sequence[str]
    lalm_samples: int
    teacher_alm: str | None = None
    teacher_alm_trust_remote_code: bool = False
    teacher_prompts: str | None = None
    # It is no classifier, so none is served or trained.
    serves_classifier = False

    @property
    def display_name(self) -> str:
        """Name of the teacher in results."""
        # A run of which no method asks the teacher need not say which model it would be.
        return AUDIO_TEXT_TEACHER if self.teacher_alm is None else alm_name(self.teacher_alm)

    def load(self, target: str, run_opts: Mapping | None = None) -> AudioTextModel:
        """Load the model; one that was trained on the target is refused."""
        if self.teacher_alm is None:
            raise UserError(
                f"--teacher {AUDIO_TEXT_TEACHER}: which one? Pass --teacher_alm FOLDER, as "
                "recipes/*/dual_encoder/train.py writes it, or the folder or hub id of a CLAP-like model."
            )
        trust = self.teacher_alm_trust_remote_code
        model = open_alm(self.teacher_alm, trust_remote_code=trust, device=device_of(run_opts), flag="--teacher_alm")
        refuse_known_corpus(model.trained_on, target, "--teacher_alm")
        return model

    def answer(self, wavs: Mapping[str, str], target: CorpusSettings, store, train, run_opts=None) -> Answers:
        """Let the model answer about some recordings."""
        keys, model = list(wavs), self.load(target.name, run_opts)
        manifests = [unlabelled(target.manifests / f"{split}.json") for split in ("adapt", "test")]
        embedded = embed_manifests(model, manifests, 1, target.feature_folder, target.name)
        reference, prompts = list(encoded_rows(manifests[0], embedded)), read_prompts(self.teacher_prompts)
        given = (prompts, self.labels, self.lalm_samples, TEACHER_SEED, reference)
        probs = teacher_samples(model, embedded, keys, *given)
        there = torch.ones(probs.shape[:2])
        samples = Samples(probs, there.bool(), (there * KINDS.index("distribution")).to(torch.int8))
        return Answers(samples, keys, self.lalm_samples, len(self.labels), model.fingerprint())


def teacher_of(hparams: Mapping, recogniser: Path | None = None) -> ApiTeacher | AudioTextTeacher:
    """Read the teacher from a recipe's hparams; `recogniser` is a folder that is served on this machine."""
    if hparams["teacher"] == AUDIO_TEXT_TEACHER:
        return AudioTextTeacher(
            labels=hparams["labels"],
            lalm_samples=hparams["lalm_samples"],
            teacher_alm=hparams["teacher_alm"],
            teacher_alm_trust_remote_code=hparams["teacher_alm_trust_remote_code"],
            teacher_prompts=hparams["teacher_prompts"],
        )
    profile = hparams["lalm_profile"] or {}
    if hparams["lalm_base_url"] is None and profile.get("base_url") is not None:
        profile = {}  # a classifier served here in place of the provider, whose limits do not hold for it
    profile = Profile.of(
        profile,
        base_url=hparams["lalm_base_url"],
        model=hparams["lalm_model"],
        answer_form=hparams["lalm_answer_form"],
        concurrency=hparams["lalm_concurrency"],
    )
    template, *variants = hparams["lalm_prompts"] or [DEFAULT_TEMPLATE]
    return ApiTeacher(
        name=hparams["teacher"],
        teacher_folder=Path(hparams["teacher_folder"]),
        profile=profile,
        prompt=Prompt(
            hparams["labels"],
            profile.answer_form,
            template,
            audio_part=profile.audio_part,
            constraint=profile.constraint,
            variants=variants,
            shuffle_labels=hparams["lalm_shuffle_labels"],
        ),
        label_store=Path(hparams["label_store"]),
        lalm_samples=hparams["lalm_samples"],
        lalm_temperature=hparams["lalm_temperature"],
        lalm_budget=hparams["lalm_budget"],
        lalm_deadline=hparams["lalm_deadline"],
        lalm_card=hparams["lalm_card"],
        recogniser=recogniser,
    )


def ask_teacher(
    teacher: ApiTeacher | AudioTextTeacher,
    methods: Iterable[AdaptationMethod],
    target: CorpusSettings,
    store: FeatureStore,
    train: Callable[[], Path],
    run_opts: Mapping | None = None,
) -> Answers:
    """Collect what methods need of the teacher's answers; only what the label store lacks is asked.

    Parameters
    ----------
    teacher : ApiTeacher or AudioTextTeacher
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

    Example
    -------
    >>> teacher = AudioTextTeacher(labels=["angry", "sad"], lalm_samples=3)
    >>> target = CorpusSettings("toy", Path("manifests"), prepare=None, feature_folder=None)
    >>> ask_teacher(teacher, [], target, store=None, train=None).of("toy-1")["lalm"].shape  # no method needs an answer
    torch.Size([3, 2])
    """
    wavs = wanted_recordings(target.manifests, methods, store)
    if not wavs:
        return Answers(None, [], teacher.lalm_samples, len(teacher.labels))
    return teacher.answer(wavs, target, store, train, run_opts)


def wanted_recordings(
    manifests: Path, methods: Iterable[AdaptationMethod], store: FeatureStore | None = None
) -> dict[str, str]:
    """List the target's recordings that some method needs answers about."""
    splits = sorted({split for method in methods for split in method.answers_for})
    paths = [unlabelled(manifests / f"{split}.json") for split in splits]
    return {key: row["wav"] for path in paths for key, row in encoded_rows(path, store).items()}


def fill_label_store(
    teacher: ApiTeacher,
    wavs: Mapping[str, str],
    hashes: Mapping[str, str],
    answers: LabelStore,
    train: Callable[[], Path],
) -> tuple[Query, str]:
    """Ask for what the label store lacks; give the key of the answers in it, and a summary."""
    k, folder, endpoint = teacher.lalm_samples, None, None
    if teacher.serves_classifier:
        folder = teacher.recogniser or train()
        endpoint = local_endpoint(folder)
    query = teacher.query(endpoint)
    if not missing_answers(answers, query, hashes, k):
        return query, f"{teacher.label_store}: all answers are stored, nothing is asked."
    teacher.require_capabilities()
    # Runs side by side may share a store: the first asks, the others wait and find its answers.
    with exclusive_lock(f"{teacher.label_store}.lock"), served(folder, teacher.profile) as url:
        query = teacher.query(endpoint, url)
        asked = [(key, wavs[key]) for key in missing_answers(answers, query, hashes, k)]
        client, concurrency = teacher.client(answers, query), teacher.profile.concurrency
        report = collect(asked, teacher.prompt, client, answers, query, k, concurrency, deadline=teacher.lalm_deadline)
    return query, report.summary()


def missing_answers(answers: LabelStore, query: Query, hashes: Mapping[str, str], k: int) -> list[str]:
    """List utterances that lack samples, asked about or not."""
    have = answers.have(query)
    return [key for key, audio in hashes.items() if any((audio, i) not in have for i in range(k))]


def local_endpoint(folder: Path) -> str:
    """Identity of a classifier that is served on this machine."""
    return f"local:{recogniser_digest(folder)}"


@contextlib.contextmanager
def served(folder: Path | None, profile: Profile):
    """Serve a recogniser on a free port of the loopback interface; without one, give the address of the API."""
    if folder is None:
        yield profile.base_url
        return
    from speechbrain_mifuse.inference.server import EmotionServer  # imports aiohttp

    recogniser = EmotionRecognizer.from_hparams(folder)
    # The server logs each request.
    with quiet("speechbrain_mifuse.inference.server"), EmotionServer(recogniser, profile.model) as server:
        logger.info("serving %s at %s", folder, server.base_url)
        yield server.base_url


def collect_answers(
    teacher: ApiTeacher | AudioTextTeacher,
    methods: Mapping[str, AdaptationMethod],
    target: CorpusSettings,
    train: Callable[[], Path],
    dry_run=False,
) -> None:
    """Print the plan and collect the answers that a recipe needs, without training or encoding the target."""
    if isinstance(teacher, AudioTextTeacher):
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
    endpoint = None
    if teacher.serves_classifier:
        try:
            endpoint = local_endpoint(teacher.teacher_folder / "recogniser")
        except UserError:
            endpoint = "local:not trained yet"
    query = teacher.query(endpoint)
    with LabelStore(store if store.exists() else ":memory:") as answers:
        plan = make_plan(known, teacher.prompt, teacher.client(answers, query), answers, query, teacher.lalm_samples)
    print(plan.told(), flush=True)
    teacher.require_capabilities(max((recording.seconds for recording in known.values()), default=None))
    if dry_run:
        return
    with LabelStore(store) as answers:
        hashes = {key: recording.audio for key, recording in known.items()}
        query, summary = fill_label_store(teacher, wavs, hashes, answers, train)
        kinds = ", ".join(f"{count} {kind}" for kind, count in answers.counts(query).items() if count)
    print(f"{summary}\n{store}: {kinds or 'no answers'}", flush=True)


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
